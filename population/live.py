"""A manifest that may be replaced while it is in use: a prior fitted again takes effect without a restart."""

import logging
from pathlib import Path

from chorus.population.errors import ChorusError
from chorus.population.manifest import MANIFEST, Population, load

logger = logging.getLogger(__name__)


class LiveManifest:
    """The population in a directory as it stands now: tiers, weights and losses may change, members may not.

    A manifest that cannot be read, or whose members differ from those that are being served, is reported once and left aside.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / MANIFEST
        self._stamp = self._look()
        self._population = load(directory)

    def current(self) -> Population:
        """The latest acceptable manifest. Costs one `stat` while the file is unchanged."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            self._take_over()
        return self._population

    def _take_over(self) -> None:
        try:
            found = load(self._path.parent)
        except ChorusError as error:
            logger.error("the manifest changed and cannot be used; the one before stays in force: %s", error)
            return
        if self._population.taking_prior_of(found) is None:
            logger.error(
                "the members in %s changed; the ones before stay in force until the server is restarted", self._path
            )
            return
        logger.info("prior version %d takes over from %d", found.prior_version, self._population.prior_version)
        self._population = found

    def _look(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_size, status.st_mtime_ns)
