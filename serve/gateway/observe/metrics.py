"""The gateway's Prometheus metrics. Label values come from the manifest, routes, keys and engines, so their number is bounded."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from chorus.serve.gateway.admission.admission import Admission
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import Load
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.observe.record import Record
from chorus.serve.gateway.request.offer import Offer
from chorus.serve.gateway.shared.store import Store

# The buckets of OpenTelemetry's semantic conventions for generative AI: time to first token, per token, and duration.
_FIRST_TOKEN_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_DURATION_BUCKETS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)

_BUDGET_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)

_LOSS_BUCKETS_NATS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0)


class Metrics:
    """The gateway's metrics, in their own registry."""

    def __init__(
        self, pool: Pool, admission: Admission, offer: Callable[[], Offer], shared: Store | None = None
    ) -> None:
        """`shared` is the store in Redis; None without one."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "chorus_gateway_requests",
            "Answered requests by route, requested tier (`default` if none), tier served and HTTP status.",
            ["route", "tier_asked", "tier_served", "status"],
            registry=self._registry,
        )
        self._first_token_s = Histogram(
            "chorus_gateway_time_to_first_token_seconds",
            "Seconds from the request's arrival to the first event of its stream.",
            ["tier_served"],
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._token_s = Histogram(
            "chorus_gateway_time_per_output_token_seconds",
            "Mean seconds per token after the first, of complete streams.",
            ["tier_served"],
            buckets=_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._duration_s = Histogram(
            "chorus_gateway_request_duration_seconds",
            "Seconds from the request's arrival to the end of its answer, for requests served by a tier.",
            ["tier_served"],
            buckets=_DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self._tokens_in = Counter(
            "chorus_gateway_prompt_tokens", "Prompt tokens.", ["tier_served"], registry=self._registry
        )
        self._tokens_out = Counter(
            "chorus_gateway_completion_tokens",
            "Generated tokens, including those of abandoned and truncated streams.",
            ["tier_served"],
            registry=self._registry,
        )
        self._broken_streams = Counter(
            "chorus_gateway_broken_streams",
            "Streams that ended with an error event.",
            ["tier_served"],
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "chorus_gateway_requests_in_flight", "Requests being answered.", registry=self._registry
        )
        Gauge(
            "chorus_gateway_requests_waiting", "Requests waiting in the queue.", registry=self._registry
        ).set_function(lambda: float(admission.num_waiting))
        Gauge("chorus_gateway_prior_version", "Version of the prior in use.", registry=self._registry).set_function(
            lambda: float(offer().population.prior_version)
        )
        if shared is not None:
            Gauge(
                "chorus_gateway_redis_up", "1 if Redis answered the last command.", registry=self._registry
            ).set_function(lambda: float(shared.is_up))
        self._registry.register(_Engines(pool))
        self._registry.register(_Losses(offer))
        self._waited_s = Histogram(
            "chorus_gateway_queue_seconds",
            "Seconds in the queue, of requests served by a tier.",
            buckets=_DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self._deadlines = Counter(
            "chorus_gateway_deadlines",
            "Answers to requests with a time budget: `met`, `missed`, or `truncated` to meet it.",
            ["tier_served", "outcome"],
            registry=self._registry,
        )
        self._shrunk = Counter(
            "chorus_gateway_shrunk_requests",
            "Requests served at a smaller tier than requested, because of their time budget or the queue.",
            ["tier_served"],
            registry=self._registry,
        )
        self._drops = Counter(
            "chorus_gateway_member_drops",
            "Members dropped from running requests to meet their deadlines, if the engine reports them.",
            ["tier_served"],
            registry=self._registry,
        )
        self._budget_spent = Histogram(
            "chorus_gateway_budget_spent_ratio",
            "Duration of an answer divided by its time budget.",
            buckets=_BUDGET_BUCKETS,
            registry=self._registry,
        )
        self._echo_loss = Histogram(
            "chorus_gateway_echo_loss_nats",
            "Mean loss per token of sampled prompts, in nats, at the tier that served them.",
            ["tier_served"],
            buckets=_LOSS_BUCKETS_NATS,
            registry=self._registry,
        )
        self._tenant_requests = Counter(
            "chorus_gateway_tenant_requests",
            "Requests by API key name (`anyone` without keys) and HTTP status.",
            ["tenant", "status"],
            registry=self._registry,
        )
        self._tenant_tokens = Counter(
            "chorus_gateway_tenant_tokens",
            "Prompt and completion tokens by API key name.",
            ["tenant"],
            registry=self._registry,
        )
        self._engine_restarts = Counter(
            "chorus_gateway_engine_restarts", "Restarts of the engine.", registry=self._registry
        )
        self._background_failures = Counter(
            "chorus_gateway_background_failures",
            "Failures of background tasks, which are restarted; see the log for the cause.",
            registry=self._registry,
        )

    def count_background_failure(self) -> None:
        """Count a failure of a background task."""
        self._background_failures.inc()

    def count_restart(self) -> None:
        """Count a restart of our own engine."""
        self._engine_restarts.inc()

    def observe_echo(self, tier: str, nats: float) -> None:
        """Record the mean loss per token of a sampled prompt."""
        self._echo_loss.labels(tier).observe(nats)

    def begin(self) -> None:
        """Count a request that is about to be answered."""
        self._in_flight.inc()

    def observe(self, record: Record) -> None:
        """Count an answered request that `begin` counted before."""
        self._in_flight.dec()
        served = record.tier_served or "none"
        self._requests.labels(record.route, record.tier_asked or "none", served, str(record.status)).inc()
        self._observe_tenant(record)
        if record.tier_served is None:
            return
        self._duration_s.labels(served).observe(record.duration_s)
        self._waited_s.observe(record.waited_s)
        if record.is_shrunk:
            self._shrunk.labels(served).inc()
        if record.budget_s is not None and record.is_deadline_met is not None:
            outcome = "truncated" if record.is_truncated else "met" if record.is_deadline_met else "missed"
            self._deadlines.labels(served, outcome).inc()
            self._budget_spent.observe(record.duration_s / record.budget_s)
        if record.num_drops:
            self._drops.labels(served).inc(record.num_drops)
        if record.first_token_s is not None:
            self._first_token_s.labels(served).observe(record.first_token_s)
        if (token_s := record.token_s) is not None:
            self._token_s.labels(served).observe(token_s)
        if record.usage is not None:
            self._tokens_in.labels(served).inc(record.usage.prompt_tokens)
            self._tokens_out.labels(served).inc(record.usage.completion_tokens)
        if record.is_broken:
            self._broken_streams.labels(served).inc()

    def _observe_tenant(self, record: Record) -> None:
        if record.tenant is None:
            return
        self._tenant_requests.labels(record.tenant, str(record.status)).inc()
        if record.usage is not None:
            tokens = record.usage.prompt_tokens + record.usage.completion_tokens
            self._tenant_tokens.labels(record.tenant).inc(tokens)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """Gauges of the engines, computed at each scrape, so that engines that are gone leave no series behind."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family per gauge, labelled with the engine's address, or `own` for the engine that the gateway runs."""
        facts: dict[str, tuple[str, Callable[[Engine], float]]] = {
            "up": ("1 if the engine is up.", lambda engine: engine.is_up),
            "circuit_open": (
                "1 if the circuit breaker is open after repeated failures.",
                lambda engine: not engine.breaker.is_closed,
            ),
            "sequences": (
                "Sequences of this gateway that run on the engine.",
                lambda engine: engine.traffic.num_sequences,
            ),
            "member_rows": ("Member rows per step.", lambda engine: engine.traffic.load().rows),
            "token_seconds": (
                "Expected seconds per token after adding one sequence with one member.",
                lambda engine: engine.model.token_s(_with_one_more(engine.traffic.load())),
            ),
            "budget_kept_back_ratio": (
                "Fraction of a time budget that the gateway keeps in reserve.",
                lambda engine: engine.reserve.share,
            ),
        }
        for name, (text, fact) in facts.items():
            family = GaugeMetricFamily(f"chorus_gateway_engine_{name}", text, labels=["engine"])
            for engine in self._pool.engines:
                family.add_metric(["own" if engine.is_supervised else engine.url], float(fact(engine)))
            yield family


class _Losses(Collector):
    """Test loss of each tier on offer, from the manifest."""

    def __init__(self, offer: Callable[[], Offer]) -> None:
        self._offer = offer

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample per tier with a test loss."""
        text = "Test loss of the tier, in nats per token, from the manifest."
        family = GaugeMetricFamily("chorus_gateway_tier_test_loss_nats", text, labels=["tier"])
        for tier in self._offer().population.tiers:
            if tier.test_loss is not None:
                family.add_metric([tier.name], tier.test_loss.nats)
        yield family


def _with_one_more(load: Load) -> Load:
    return Load(members=max(1.0, load.members), rows=load.rows + 1)
