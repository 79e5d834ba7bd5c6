"""The bridges to other libraries stay out of the way: nothing is imported unasked, and what is missing is named."""

from __future__ import annotations

import pytest
from child import run_script


def test_forge_c_imports_neither_torch_nor_transformers() -> None:
    run_script("""
        import sys
        import forge_c, forge_c.integrations, forge_c.nn, forge_c.models
        for name in forge_c.__all__:
            getattr(forge_c, name)
        assert not {"torch", "transformers"} & set(sys.modules), "imported unasked"
    """)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_library_is_named_with_its_remedy(missing: str) -> None:
    out = run_script(f"""
        import sys
        sys.modules[{missing!r}] = None
        try:
            import forge_c.integrations.transformers
        except ImportError as error:
            print(error)
    """)
    assert "needs torch and transformers" in out and "pip install 'forge_c[transformers]'" in out


def test_an_old_transformers_is_refused() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = run_script("""
        import transformers
        transformers.__version__ = "4.57.1"
        try:
            import forge_c.integrations.transformers
        except ImportError as error:
            print(error)
    """)
    assert "5.4 or later, found 4.57.1" in out
