"""Another project's distributions install the import name `fastembed` too; whoever was installed last wins."""

import warnings
from importlib import metadata

OURS = "fastembed-kernels"
OTHERS = ("fastembed", "fastembed-gpu")


def warn_if_name_is_shared() -> None:
    """Warn when one environment holds both, since pip lets the two overwrite each other's files without a word."""
    # Looking names up takes a fraction of a millisecond each; metadata.packages_distributions() half a second.
    for name in OTHERS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        warnings.warn(
            f"{OURS} and {name} {version} (Qdrant) are installed together, and both own the import name 'fastembed': "
            f"files of one have overwritten the other's. Keep them in separate environments; to mend this one, "
            f"uninstall both and install the one you want.",
            RuntimeWarning,
            stacklevel=3,
        )
        return
