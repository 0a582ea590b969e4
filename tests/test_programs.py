"""What was traced is kept, and used only where it is whole and of the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import programs

X = np.arange(6, dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_function_is_traced_once_for_each_shape_and_kind_of_argument(folder):
    traced = []

    def kept(about):
        def function(weights, x, beside):
            traced.append(x.shape)
            return weights["w"] * x if beside is None else weights["w"] * x + beside

        return programs.Kept(jax.jit(function), about)

    one = kept(["scale"])
    for _ in range(2):
        np.testing.assert_array_equal(one({"w": X}, X, None), X * X)
    assert traced == [(6,)]
    for beside in (None, X):
        expected = X * X if beside is None else X * X + X
        np.testing.assert_array_equal(kept(["scale"])({"w": X}, X, beside), expected)
    assert len(traced) == 2  # once more for what comes beside
    kept(["another"])({"w": X}, X, None)
    assert len(traced) == 3
    np.testing.assert_array_equal(kept(["scale"])({"w": X[:1] + 2}, X, None), 2 * X)
    kept(["scale"])({"w": X.astype(np.int32)}, X, None)
    assert len(traced) == 5
    assert len(list(folder.iterdir())) == 5
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    np.testing.assert_array_equal(kept(["scale"])({"w": X}, X, None), X * X)
    assert len(traced) == 6  # none was whole
    np.testing.assert_array_equal(kept(["scale"])({"w": X}, X, None), X * X)
    assert len(traced) == 6


def test_without_a_cache_it_is_traced_anew_and_says_the_same(folder, monkeypatch):
    traced = []

    def make():
        traced.append(1)
        return {"a": [1, 2]}

    for _ in range(2):
        assert programs.remembered("shapes", make) == {"a": [1, 2]}
    assert traced == [1]
    monkeypatch.setattr(programs, "_source", lambda: "other code")
    assert programs.remembered("shapes", make) == {"a": [1, 2]}
    assert traced == [1, 1]
    table = folder.parent / "forms.json"
    for content in ("{}", "{} "):  # other forms of convolutions, also under the same name
        table.write_text(content)
        monkeypatch.setenv("HAM_JAX_CONV_TABLE", str(table))
        assert programs.remembered("shapes", make) == {"a": [1, 2]}
    assert traced == [1] * 4
    for nowhere in (None, "gs://bucket/cache", "/dev/null/folder"):
        jax.config.update("jax_compilation_cache_dir", nowhere)
        for _ in range(2):
            assert programs.remembered("shapes", make) == {"a": [1, 2]}
        double = programs.Kept(jax.jit(lambda x, y: jnp.float32(2) * x + y), "double")
        np.testing.assert_array_equal(double(X, X), 3 * X)
    assert len(traced) == 10
