"""Makes an installed fptquant known to transformers, without an `import fptquant` in the user's program.

`fptquant_autoload.pth` runs this whenever Python starts, so it imports nothing that costs time. It waits for the two
modules of transformers that hold the tables in which `from_pretrained` looks up what it read in config.json;
`fptquant.hf_entries` then adds our entries. FPTQUANT_AUTOLOAD=0 in the environment switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # as in typing, which takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# Module of transformers with a table: function of fptquant.hf_entries that adds to it.
_TABLES = {
    "transformers.models.auto.configuration_auto": "add_model_types",
    "transformers.quantizers.auto": "add_quantization_method",
}


def at_start() -> None:
    """Installs unless the environment says FPTQUANT_AUTOLOAD=0: what the .pth file calls."""
    if os.environ.get("FPTQUANT_AUTOLOAD", "1") != "0":
        install()


def install() -> None:
    """Adds our entries as soon as transformers has the tables, or now where it has them. Again is no harm."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    loaded = [name for name in _TABLES if name in sys.modules]
    if loaded:
        from importlib import import_module

        for name in loaded:
            _add_entries(import_module(name))  # which waits for a thread that is still importing it


class _Finder:
    """Finds the modules with tables, as whatever comes behind it in `sys.meta_path` does, and has them announced."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec that the next finder gives, its loader wrapped; None for every other module."""
        if name not in _TABLES:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 if self in finders else 0 :]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # its base takes long to import
                return spec
        return None


class _Loader:
    """A module's own loader, and our entries once the module has run."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Runs the module and leaves it with its own loader, as if we had not been there."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _add_entries(module)


def _add_entries(module: "ModuleType") -> None:
    """Adds our entries to one module's table. Whatever goes wrong with us is one warning: transformers has to work."""
    try:
        from fptquant import hf_entries

        getattr(hf_entries, _TABLES[module.__name__])()
    except Exception as error:
        import logging

        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        logging.getLogger("fptquant").warning(
            "fptquant can't register itself with transformers, which won't load its checkpoints (%s: %s): install "
            "vllm-fptquant again, or set FPTQUANT_AUTOLOAD=0 to do without it",
            type(error).__name__,
            " ".join(str(error).split()),
        )
