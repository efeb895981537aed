"""All is in pyproject.toml but this: a wheel that carries the built operator library is for one platform only."""

from pathlib import Path

from setuptools import Distribution, setup

LIBRARY = Path(__file__).parent / "exporter" / "engines" / "libheadpool_ops.so"


class Built(Distribution):
    """A distribution that has compiled code where scripts/ops has been run."""

    def has_ext_modules(self) -> bool:
        return LIBRARY.is_file()


setup(distclass=Built)
