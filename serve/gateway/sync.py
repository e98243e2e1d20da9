"""Sharing with other gateways through the store: our own engine's address, learned engine times, and the live prior."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.shared.store import Store

logger = logging.getLogger(__name__)

_MAX_VERSIONS_AHEAD = 1000
"""Most versions by which a published prior may be ahead of ours; one further ahead is rejected as invalid."""


async def share(
    store: Store, pool: Pool, current: Callable[[], Population], directory: Path | None, *, interval_s: float
) -> None:
    """Share every `interval_s` seconds until cancelled. Failures are logged and retried."""
    published: dict[str, int] = {}
    while True:
        try:
            for engine in pool.engines:
                if engine.is_up and engine.is_supervised:
                    await store.announce(engine.url)
                if engine.is_up and engine.model.is_seeded and published.get(engine.url) != engine.model.count:
                    published = {each.url: published.get(each.url, 0) for each in pool.engines}
                    published[engine.url] = engine.model.count
                    await store.save_model(engine.url, engine.model.state())
            await _sync_prior(store, current(), directory)
        except Exception:  # no failure may end the sharing
            logger.exception("sharing with other gateways failed; trying again")
        await asyncio.sleep(interval_s)


async def seed(store: Store, engine: Engine) -> bool:
    """Restore what other gateways learned about an engine. Returns whether its expected times are known now."""
    state = await store.load_model(engine.url)
    if state is None:
        return False
    try:
        engine.model.restore(state)
    except (KeyError, TypeError, ValueError) as error:
        logger.warning("cannot use what other gateways learned about engine %s: %s", engine.url, error)
        return False
    return engine.model.is_seeded


async def _sync_prior(store: Store, ours: Population, directory: Path | None) -> None:
    """Publish our prior if it is the newest; else write the newer one to `directory`, where the engine and the offer reload it.

    Only the fields that a fit sets are taken over. A published prior that this population cannot use is replaced by ours.
    """
    live = await store.live_prior()
    if live is None or live[0] < ours.prior_version:
        await store.publish_prior(ours.prior_version, ours.model_dump_json())
        return
    version, text = live
    if version == ours.prior_version:
        return
    try:
        theirs = Population.model_validate_json(text)
        taken = ours.taking_prior_of(theirs)
        if taken is None:
            raise ChorusError("it was fitted to other members")
        if taken.prior_version != version or version > ours.prior_version + _MAX_VERSIONS_AHEAD:
            raise ChorusError(f"its version is inconsistent or too far ahead of {ours.prior_version}")
    except (ValidationError, ChorusError) as error:
        logger.error("cannot use the published prior version %d; replacing it with ours: %s", version, error)
        await store.publish_prior(ours.prior_version, ours.model_dump_json(), replacing=text)
        return
    if directory is not None:
        try:
            await asyncio.to_thread(manifest.save_newer, taken, directory)  # a fit may hold the manifest for seconds
        except OSError as error:
            logger.error("cannot write the published prior version %d: %s", version, error)
