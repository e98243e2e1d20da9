"""Reloads a manifest when its file changes, so that a new prior takes effect without a restart."""

import logging
from pathlib import Path

from chorus.population.errors import ChorusError
from chorus.population.manifest import MANIFEST, Population, load

logger = logging.getLogger(__name__)


class LiveManifest:
    """The current manifest of a directory: tiers, weights and losses may change, members may not.

    A manifest that cannot be read, or whose members differ from the loaded ones, is logged once and ignored.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / MANIFEST
        self._stamp = self._read_stamp()
        self._population = load(directory)

    def current(self) -> Population:
        """The latest valid manifest. Costs one `stat` if the file is unchanged."""
        stamp = self._read_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            self._reload()
        return self._population

    def _reload(self) -> None:
        try:
            found = load(self._path.parent)
        except ChorusError as error:
            logger.error("the manifest changed and cannot be used; keeping the previous one: %s", error)
            return
        if self._population.taking_prior_of(found) is None:
            logger.error(
                "the members in %s changed; keeping the previous manifest until the server is restarted", self._path
            )
            return
        logger.info("prior version %d replaces version %d", found.prior_version, self._population.prior_version)
        self._population = found

    def _read_stamp(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_size, status.st_mtime_ns)
