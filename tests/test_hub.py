"""Hub ids go through huggingface_hub itself, against a server of our own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from helpers import one_device
from hf_folders import config_json, folder, weights
from huggingface_hub import constants

import bloomjax
from bloomjax import memory
from bloomjax.errors import DoesNotFitError, InputError
from bloomjax.formats import hub
from bloomjax.formats.hf import HFReader

COMMIT, TAG = "0123456789abcdef0123456789abcdef01234567", "global_step1000"
ID = "org/bloom-tiny"


class Hub(BaseHTTPRequestHandler):
    """The few answers that downloads need: a revision, its files, and each of them."""

    files: dict[str, bytes]
    served: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        api = f"/api/models/{ID}"
        if path in (f"{api}/revision/{name}" for name in ("main", TAG)):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": ID, "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(about).encode(), {}, body)
        elif path == f"{api}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send(json.dumps(entries).encode(), {}, body)
        elif path.startswith(f"/{ID}/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/")[1]
            data = self.files[name]
            if body:
                self.served.append(name)
            tags = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(data, tags, body)
        else:
            code = "RevisionNotFound" if path.startswith(f"{api}/revision/") else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A Hub that has bloom-tiny in both kinds of files, and a cache with nothing in it."""
    made = folder(
        tmp_path / "made", {"model.safetensors": weights(), "pytorch_model.bin": weights()}
    )
    files = {file.name: file.read_bytes() for file in made.iterdir()}
    others = ["README.md", "flax_model.msgpack", "bloom.Q8_0.gguf", "onnx/model.safetensors"]
    others.append("model-old/1-of-2.safetensors")
    files |= {name: b"not for us" for name in others}
    handler = type("OneHub", (Hub,), {"files": files, "served": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=running.serve_forever, daemon=True).start()
    _point(monkeypatch, f"http://127.0.0.1:{running.server_port}", tmp_path / "cache")
    yield handler
    running.shutdown()
    running.server_close()


def _point(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_sizes_first_then_only_what_we_read(server: type[Hub], capsys) -> None:
    source = f"{ID}@{TAG}"
    remote = hub.find(source)
    size = sum(len(server.files[name]) for name in ("config.json", "model.safetensors"))
    assert remote == (ID, TAG, COMMIT, ("config.json", "model.safetensors"), size, size)
    assert not server.served
    path, origin = hub.fetch(source)
    assert f"commit {COMMIT}" in capsys.readouterr().err
    assert sorted(server.served) == ["config.json", "model.safetensors"]
    digest = sha256(server.files["model.safetensors"]).hexdigest()
    assert (origin["repository"], origin["revision"], origin["commit"]) == (ID, TAG, COMMIT)
    assert origin["files_sha256"]["model.safetensors"] == digest
    assert HFReader(path, origin).origin["commit"] == COMMIT
    assert hub.find(source).missing == 0
    hub.fetch(source)
    assert len(server.served) == 2  # the second time nothing came over the wire


@pytest.mark.parametrize("told", [{}, {"torch_dtype": "float32"}, {"dtype": "float32"}])
def test_weights_that_will_not_fit_are_not_fetched(
    server: type[Hub], monkeypatch, told: dict[str, str]
) -> None:
    """By config.json, which may tell the dtype; 16 bits otherwise, as BLOOM has."""
    shape = {"layers": 12, "width": 64, "heads": 2, "vocab_size": 500}
    server.files["config.json"] = json.dumps(config_json(**shape, **told)).encode()
    server.files["tokenizer.json"] = b"{}"
    server.files["model.safetensors"] = b"8 bytes, and no weights"
    parameters = 12 * 12 * 64 * 64 + 500 * 64
    mesh = one_device()
    for bytes_each, fits in (1, False), (3, not told), (5, True):
        free = bytes_each * parameters
        monkeypatch.setattr(memory, "free", lambda devices, free=free: free)
        error = InputError if fits else DoesNotFitError
        with pytest.raises(error, match="model.safetensors" if fits else "of free memory"):
            bloomjax.load(ID, mesh)
        assert ("model.safetensors" in server.served) == fits
    assert sorted(server.served) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_weights_of_another_model_are_not_fetched(server: type[Hub]) -> None:
    server.files["config.json"] = json.dumps(config_json(model_type="llama")).encode()
    with pytest.raises(InputError, match="model_type of bloom, found 'llama'"):
        bloomjax.load(ID)
    assert server.served == ["config.json"]


def test_a_model_that_fits_is_loaded(server: type[Hub], caplog) -> None:
    with caplog.at_level("INFO", "bloomjax"):
        model = bloomjax.load(ID, one_device())
    assert f"commit {COMMIT}" in model.origin and len(caplog.records) == 1
    assert sorted(server.served) == ["config.json", "model.safetensors"]


def test_bin_only_if_there_are_no_safetensors(server: type[Hub]) -> None:
    del server.files["model.safetensors"]
    path, _ = hub.fetch(ID)
    assert sorted(server.served) == ["config.json", "pytorch_model.bin"]
    HFReader(path)


def test_a_model_that_others_read(server: type[Hub]) -> None:
    del server.files["model.safetensors"], server.files["pytorch_model.bin"]
    with pytest.raises(InputError, match=r"expected safetensors or \.bin"):
        hub.find(ID)


def test_offline_the_cache_answers(server: type[Hub], monkeypatch, tmp_path: Path) -> None:
    hub.fetch(f"{ID}@{TAG}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path, origin = hub.fetch(f"{ID}@{TAG}")
    assert origin["commit"] == COMMIT and len(server.served) == 2
    HFReader(path)
    with pytest.raises(InputError, match="nothing in the cache"):
        hub.find(f"{ID}@another")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _point(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # nobody listens there
    assert hub.fetch(f"{ID}@{TAG}")[0] == path
    with pytest.raises(InputError, match="nothing in the cache"):
        hub.find("runs/mistyped")


def test_a_cache_that_came_by_other_ways(tmp_path: Path) -> None:
    """A fresh process, with the variables that people set."""
    cache = tmp_path / "hub" / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    (cache / "snapshots").mkdir()
    snapshot = folder(cache / "snapshots" / COMMIT, {"model.safetensors": weights()})
    code = "from bloomjax.formats import hub; print(hub.fetch('org/name')[0])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(snapshot)


def test_what_is_not_there_is_said_in_one_line(server: type[Hub], monkeypatch) -> None:
    for source, part in (
        (f"{ID}@nowhere", "tag, branch or commit"),
        ("org/unknown", "found neither"),
        ("a--b/c..d", "no valid name"),
    ):
        with pytest.raises(InputError) as caught:
            hub.find(source)
        assert part in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFitError, match=r"0\.0 MB free"):
        hub.fetch(ID)
    assert not server.served


def test_what_is_spelt_like_an_id() -> None:
    for source in ("quickstart", "/a/b", "a/b/c", "../x", "./x/y", "x/y@", "x/y@../z", "x y/z"):
        assert not hub.is_id(source)
    for source in ("bigscience/bloom", "bigscience/bloom-560m-intermediate@global_step100000"):
        assert hub.is_id(source)
