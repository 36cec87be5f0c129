"""bloomjax: BLOOM on JAX meshes."""
