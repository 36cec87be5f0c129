"""Every notebook runs from top to bottom, in a kernel of its own, on a tiny model of this machine.

What Colab adds (its badge, the first cell's installation) is not run, only read.
"""

import json
import sysconfig
from pathlib import Path

import pytest
from foreign import Memory, copy
from helpers import model_config
from trial import corpus

from bloomjax.data.tokenizer import train_tokenizer
from bloomjax.formats.hf import HFWriter
from bloomjax.formats.tensors import DTYPES

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Hugging Face's format, with a byte-level tokenizer that knows any text."""
    root = tmp_path_factory.mktemp("notebooks")
    texts = (path.read_text() for path in corpus(root).iterdir())
    train_tokenizer(texts, 320, root / "tokenizer.json")
    config = model_config(width=64, heads=4, vocab_size=320, init_std=0.1)
    files = {"tokenizer.json": (root / "tokenizer.json").read_bytes()}
    source = Memory(config, "float16", files=files)
    copy(source, HFWriter(root / "tiny", config, DTYPES["float16"], tokenizer=files, origin={}))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", str(folder / "tiny"))
    monkeypatch.setenv("TEXT", sysconfig.get_path("stdlib") + "/*.py")
    monkeypatch.setenv("STEPS", "12")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    printed = [
        output.get("text", "") + "".join(output.get("data", {}))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert any(printed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs_and_open_from_their_badge(path: Path) -> None:
    notebook = json.loads(path.read_text())
    nbformat.validate(nbformat.from_dict(notebook))
    assert f"blob/main/notebooks/{path.name})" in "".join(notebook["cells"][0]["source"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "google.colab" in "".join(code[0]["source"])
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 4
