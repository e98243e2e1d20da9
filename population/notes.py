"""What a user should know about a corpus though it is no error: logged, since only commands print."""

import logging

logger = logging.getLogger(__name__)


class Notes:
    """Sentences for the user, each logged once however often the corpus is read."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def __call__(self, sentence: str) -> None:
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning("%s", sentence)
