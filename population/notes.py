"""Notes about a corpus that are not errors. They are logged, since only commands print."""

import logging

logger = logging.getLogger(__name__)


class Notes:
    """Logs each sentence once, even if the corpus is read several times."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def __call__(self, sentence: str) -> None:
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning("%s", sentence)
