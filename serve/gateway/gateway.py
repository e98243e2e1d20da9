"""The state of a running gateway: settings, engines, connections to them, background tasks and metrics."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import aiohttp

from chorus.serve.gateway.admission.admission import Admission
from chorus.serve.gateway.admission.slots import Slots
from chorus.serve.gateway.background import Background
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.discovery import Discovery, can_change
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.engines.supervisor import EngineFailedError, Supervision, Supervisor, engine_command
from chorus.serve.gateway.observe.drift import DriftSampler
from chorus.serve.gateway.observe.metrics import Metrics
from chorus.serve.gateway.observe.tracing import Tracing
from chorus.serve.gateway.relay.calibration import calibrate
from chorus.serve.gateway.request.offer import LiveOffer, Offer
from chorus.serve.gateway.settings import Settings
from chorus.serve.gateway.shared.store import MemoryStore, Store
from chorus.serve.gateway.sync import seed, share
from chorus.serve.gateway.transport.bodies import Bodies

logger = logging.getLogger(__name__)


class Gateway:
    """The state that all requests share. It belongs to one event loop, for the duration of `running`."""

    def __init__(
        self,
        settings: Settings,
        *,
        on_up: Callable[[str, float | None], None] = lambda url, start_s: None,
        on_failure: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.settings = settings
        self.population_name = settings.population.name
        self.pool = Pool()
        self._offer = LiveOffer(
            settings.population, settings.default_tier_name, settings.manifest, lambda: self.pool.context_length
        )
        self.admission = Admission(settings.limits, self.pool.candidates)
        self.slots = Slots()
        self.keys = settings.keys
        self._watches: dict[str, asyncio.Task[None]] = {}
        """Watch tasks of the engines that others run, by address."""
        self.bodies = Bodies(
            max_bytes=settings.max_body_bytes,
            max_total_bytes=max(settings.max_bodies_bytes, settings.max_body_bytes),
            timeout_s=settings.body_timeout_s,
        )
        self.store: Store = MemoryStore()
        if settings.redis is not None:
            from chorus.serve.gateway.shared.redis_store import RedisStore  # only a shared store needs the Redis client

            self.store = RedisStore(settings.redis, self.population_name)
        self.is_draining = False
        """Whether the gateway is stopping: it only finishes the requests that it has."""
        shared = self.store if settings.redis is not None else None
        self.metrics = Metrics(self.pool, self.admission, self._offer.current, shared)
        self.background = Background(self.metrics.count_background_failure)
        self.drift = DriftSampler(self.pool, settings.echo_part, self.metrics.observe_echo)
        self.tracing: Tracing | None = None
        if settings.otlp_traces_endpoint is not None:
            self.tracing = Tracing(settings.otlp_traces_endpoint, population=self.population_name)
        self.session: aiohttp.ClientSession
        self._on_up = on_up
        self._on_failure = on_failure

    @property
    def offer(self) -> Offer:
        """The tiers on offer now."""
        return self._offer.current()

    @property
    def engines(self) -> list[Engine]:
        """All engines, up or not."""
        return self.pool.engines

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run or watch the engines. Requests are accepted at once and get 503 until an engine is up."""
        settings = self.settings
        async with upstream.open_session() as self.session:
            try:
                begin = self.background.begin
                if settings.sources:
                    begin("engine discovery", self._discover)
                else:
                    self._add("")
                begin("the admission queue", self.admission.run)
                if settings.echo_part:
                    is_busy = lambda: self.admission.num_waiting > 0  # noqa: E731
                    begin("prompt sampling", partial(self.drift.run, self.session, is_busy))
                if settings.redis is not None:
                    begin("the gateway registration", self.store.run)
                    begin("state sharing", self._share)
                yield
            finally:
                await self.background.end()
                await self.store.close()
                if self.tracing is not None:
                    await asyncio.to_thread(self.tracing.close)

    async def _share(self) -> None:
        await share(
            self.store,
            self.pool,
            lambda: self.offer.population,
            self.settings.directory,
            interval_s=self.settings.discovery_interval_s / 2,
        )

    async def _discover(self) -> None:
        """Track engines that others run as they appear and disappear. One that disappears may finish its requests."""
        sources, watches = self.settings.sources, self._watches
        discovery = Discovery(sources, self.store)
        while True:
            found = await discovery.find()
            for url in found:
                if url not in watches:
                    watches[url] = self._add(url)
            for url in set(watches) - set(found):
                logger.info("engine %s was removed", url)
                watches.pop(url).cancel()
                self.pool.engines = [engine for engine in self.pool.engines if engine.url != url]
            if not can_change(sources):
                return
            await asyncio.sleep(self.settings.discovery_interval_s)

    def _add(self, url: str) -> asyncio.Task[None]:
        engine = Engine(
            self.session,
            url=url,
            is_supervised=not url,
            probe_interval_s=self.settings.probe_interval_s,
            probe_timeout_s=self.settings.probe_timeout_s,
            stall_timeout_s=self.settings.stall_timeout_s,
        )
        engine.on_restart = self.metrics.count_restart
        self.pool.engines = [*self.pool.engines, engine]
        # A supervisor that is cancelled gives its engine time to stop, so it is cancelled only once.
        return self.background.begin(
            "engine monitoring", partial(self._run_engine, engine), cancel_once=engine.is_supervised
        )

    async def _run_engine(self, engine: Engine) -> None:
        supervision = self.settings.engine
        if not isinstance(supervision, Supervision):
            await engine.watch(lambda: self._on_engine_up(engine, None))
            return
        supervisor = Supervisor(engine, supervision, partial(engine_command, self.population_name, supervision))
        try:
            await supervisor.run(lambda start_s: self._on_engine_up(engine, start_s))
        except EngineFailedError as error:
            self._on_failure(str(error))
        except Exception as error:  # a gateway that no longer supervises its engine must report it, whatever the cause
            logger.exception("engine supervision failed")
            self._on_failure(f"engine supervision failed: {error}")

    def _on_engine_up(self, engine: Engine, start_s: float | None) -> None:
        self.background.begin("engine calibration", partial(self._learn, engine), restart=False)
        self.admission.admit_waiting()
        self._on_up(engine.url, start_s)

    async def _learn(self, engine: Engine) -> None:
        """Learn an engine's context length and expected times before requests depend on them.

        An engine of our own whose times are known is calibrated again after a restart, which also warms it up.
        """
        await engine.read_context_length()
        if not self.settings.calibrates or (engine.model.is_seeded and not engine.is_supervised):
            return
        if engine.model.is_seeded or not await seed(self.store, engine):
            await calibrate(self.session, engine, self.offer.population)
