"""Chorus: train, weigh and serve populations of language models. Its rooms are the repository's folders, linked here."""
