"""Metrics through OpenTelemetry's API: what they say, for whom, and that they cost and break nothing."""

import gc
import sys
import textwrap
import threading

import pytest
from opentelemetry import metrics
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from perqueue import ActivityRejected, ConfigurationError, OutboxError, PerQueue, RetryPolicy
from perqueue._instruments import OF_THE_OUTBOX, OF_THE_PROCESS, RECORD_DURATION, REQUEST_DURATION
from perqueue._measures import SAMPLES
from perqueue.sandbox import BadToken, Latency, Refuse, Status
from tests.helpers import Child
from tests.metrics.conftest import Collected

QUICK = RetryPolicy(base=0.05, cap=0.1)
NAMES = {spec.name for spec in (*OF_THE_OUTBOX, *OF_THE_PROCESS, RECORD_DURATION, REQUEST_DURATION)}


def test_metrics_tell_what_became_of_activities(per, make_queue, provider, collect, outbox):
    """Recorded, delivered, rejected, refused and retried: the numbers are those of the ledger."""
    per.set_fault(Refuse("no such group"), when=lambda activity: activity.user_id == "BAD")
    per.set_fault(Status(500), when=lambda activity: activity.user_id == "USER_1", times=2)
    queue = make_queue(meter_provider=provider, retry=QUICK)
    for number in range(20):
        queue.record("GROUP_A", f"USER_{number}")
    queue.record("GROUP_A", "BAD")
    with pytest.raises(ActivityRejected):
        queue.flush(10)
    seen = collect()
    assert seen.names == NAMES
    assert seen("perqueue.outbox.recorded", outbox) == 21
    assert seen("perqueue.outbox.delivered") == per.accepted == 20
    assert seen("perqueue.outbox.rejected") == 1
    assert seen("perqueue.outbox.pending") == seen("perqueue.outbox.damaged") == 0
    assert seen("perqueue.outbox.oldest_age") == 0
    assert seen("perqueue.outbox.size", file="database") == outbox.stat().st_size
    wal = outbox.with_name(f"{outbox.name}-wal").stat().st_size
    assert 0 < seen("perqueue.outbox.size", file="wal") <= wal
    assert seen.state() == "idle"
    assert seen("perqueue.drain.requests", outcome="accepted") == 20
    assert seen("perqueue.drain.requests", outcome="rejected", type="refused") == 1
    assert seen("perqueue.drain.requests", outcome="retried", type="http_5xx") == 2
    assert seen("perqueue.record.duration").count == 21
    assert seen("perqueue.drain.request.duration", outcome="accepted").count == 20
    assert 0 < seen("perqueue.record.duration").sum < 10
    assert seen("perqueue.drain.in_flight") == 0
    assert seen("perqueue.drain.in_flight_limit") >= 1


def test_an_outage_is_seen_coming_and_going(per, make_queue, provider, collect, until):
    """While Per is away pending and age grow and the state says so; afterwards all is as before."""
    queue = make_queue(meter_provider=provider, retry=QUICK)
    queue.record("GROUP_A", "USER_0").wait(10)
    per.set_fault(Status(503))
    for number in range(10):
        queue.record("GROUP_A", f"USER_{number}")
    until(lambda: collect().state() == "backing_off")
    age = collect()("perqueue.outbox.oldest_age")
    until(lambda: collect()("perqueue.outbox.oldest_age") > age + 0.2)
    seen = collect()
    assert seen("perqueue.outbox.pending") == 10
    assert seen("perqueue.outbox.pauses") >= 1
    per.clear_faults()
    queue.flush(10)
    seen = collect()
    assert (seen("perqueue.outbox.pending"), seen("perqueue.outbox.oldest_age"), seen.state()) == (
        0,
        0,
        "idle",
    )
    assert seen("perqueue.drain.requests", outcome="accepted") == per.accepted == 11
    assert seen("perqueue.outbox.pauses") >= 1


def test_a_pause_and_requests_in_flight_are_seen(per, make_queue, provider, collect, until):
    """A bad token is the state paused and its own kind of error; while Per is slow, who waits is counted."""
    per.set_fault(BadToken())
    queue = make_queue(meter_provider=provider)
    queue.record("GROUP_A", "USER_1")
    until(lambda: collect().state() == "paused")
    assert collect()("perqueue.drain.requests", type="bad_token") >= 1
    per.clear_faults()
    per.set_fault(Latency(0.5))
    queue.record("GROUP_A", "USER_2")
    until(lambda: collect()("perqueue.drain.in_flight") >= 1)


def test_failures_to_record_are_counted(make_queue, provider, collect):
    """What could not be stored at all is the worst of losses, and has a number."""
    queue = make_queue(meter_provider=provider, drain=False, max_pending=2)
    for number in range(2):
        queue.record("GROUP_A", f"USER_{number}")
    for _ in range(3):
        with pytest.raises(OutboxError):
            queue.record("GROUP_A", "ONE_TOO_MANY")
    seen = collect()
    assert seen("perqueue.record.failures", type="OutboxFull") == 3
    assert seen("perqueue.record.failures", type="OutboxError") == 0
    assert seen("perqueue.record.duration").count == 2
    assert seen.state() == "off"
    assert seen("perqueue.drain.in_flight_limit") == 0


def test_several_queues_are_told_apart(make_queue, provider, collect, tmp_path):
    """Each outbox has numbers of its own, under its path; two queues on one outbox count once."""
    one, other = tmp_path / "one.db", tmp_path / "other.db"
    recorder = make_queue(one, meter_provider=provider, drain=False)
    make_queue(one, meter_provider=provider).record("GROUP_A", "USER_1").wait(10)
    recorder.record("GROUP_A", "USER_2").wait(10)
    make_queue(other, meter_provider=provider, drain=False).record("GROUP_A", "USER_1")
    seen = collect()
    assert seen("perqueue.outbox.recorded", one) == seen("perqueue.drain.requests", one) == 2
    assert seen("perqueue.record.duration", one).count == 2
    assert seen("perqueue.outbox.pending", other) == 1
    assert (seen.state(str(one)), seen.state(str(other))) in (("idle", "off"), ("delivering", "off"))


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_a_queue_that_is_gone_is_no_longer_shown(options, outbox, provider, collect, end):
    """A gauge of a queue that is closed or dropped disappears; what this process did stays counted."""
    queue = PerQueue(outbox, **options, meter_provider=provider)
    queue.record("GROUP_A", "USER_1").wait(10)
    assert "perqueue.outbox.pending" in collect().names
    if end == "closed":
        queue.close()
    del queue
    gc.collect()
    seen = collect()
    assert not seen.names & {spec.name for spec in OF_THE_OUTBOX}
    assert seen("perqueue.drain.requests", outbox, outcome="accepted") == 1
    again = PerQueue(outbox, **options, meter_provider=provider)
    again.record("GROUP_A", "USER_2").wait(10)
    assert collect()("perqueue.drain.requests", outbox, outcome="accepted") == 2
    again.close()


def test_no_attribute_holds_what_a_user_or_per_said(per, make_queue, provider, reader):
    """Neither IDs, tokens nor Per's own words become attributes, and no outcome makes a new one."""
    per.set_fault(Refuse("SECRET_USER of SECRET_GROUP may not SECRET_WORD"))
    queue = make_queue(meter_provider=provider)
    for number in range(5):
        queue.record("SECRET_GROUP", f"SECRET_USER_{number}", activity_type_id="SECRET_TYPE")
    with pytest.raises(ActivityRejected):
        queue.flush(10)
    shown = reader.get_metrics_data().to_json()
    assert "perqueue.drain.requests" in shown
    assert "SECRET" not in shown
    assert per.activity_token not in shown


def test_an_outbox_that_cannot_be_read_leaves_a_gap(make_queue, provider, collect, outbox):
    """Whoever collects gets no error and no wrong number of a file that went away, and all of the others."""
    queue = make_queue(meter_provider=provider, drain=False)
    healthy = make_queue(outbox.with_name("healthy.db"), meter_provider=provider, drain=False)
    healthy.record("GROUP_A", "USER_1")
    queue.record("GROUP_A", "USER_1")
    queue._outbox.position = lambda: (_ for _ in ()).throw(OutboxError("the disk is broken"))
    seen = collect()
    assert seen("perqueue.outbox.pending", outbox) is None
    assert seen("perqueue.outbox.pending", outbox.with_name("healthy.db")) == 1
    assert seen("perqueue.record.duration", outbox).count == 1


def test_a_collection_looks_once_at_each_outbox(make_queue, provider, collect, monkeypatch):
    """However many instruments there are, a collection reads the counters once, and the next one anew."""
    queue = make_queue(meter_provider=provider, drain=False)
    looks = []
    look = queue._reading
    monkeypatch.setattr(queue, "_reading", lambda: looks.append(1) or look())
    for times in (1, 2):
        queue.record("GROUP_A", "USER_1")
        assert collect()("perqueue.outbox.recorded") == times
        assert len(looks) == times


def test_histograms_have_buckets_of_their_own(per, make_queue, provider, reader):
    """Microseconds and seconds fall into buckets that tell them apart, unless a view says otherwise."""
    make_queue(meter_provider=provider).record("GROUP_A", "USER_1").wait(10)
    [scope] = reader.get_metrics_data().resource_metrics[0].scope_metrics
    bounds = {
        metric.name: metric.data.data_points[0].explicit_bounds
        for metric in scope.metrics
        if hasattr(metric.data.data_points[0], "explicit_bounds")
    }
    assert bounds == {spec.name: spec.buckets for spec in (RECORD_DURATION, REQUEST_DURATION)}


def test_many_records_between_two_collections_are_sampled(make_queue, provider, collect):
    """Memory and the time of a collection are bounded, whatever is recorded meanwhile."""
    queue = make_queue(meter_provider=provider, drain=False)
    for _ in range(SAMPLES + 200):
        queue.record("GROUP_A", "USER_1")
    seen = collect()
    assert seen("perqueue.outbox.recorded") == SAMPLES + 200
    assert seen("perqueue.record.duration").count == SAMPLES


def test_the_state_is_that_of_this_process(per, make_queue, provider, collect, until):
    """While one process is paused, one that only records is off, and a standby a standby."""
    readers = [InMemoryMetricReader() for _ in range(2)]
    others = [MeterProvider([reader], shutdown_on_exit=False) for reader in readers]
    per.set_fault(Latency(5))
    drainer = make_queue(meter_provider=provider)
    drainer.record("GROUP_A", "USER_0")
    per.wait_for_requests(1)
    recorder = make_queue(meter_provider=others[0], drain=False, on_stalled=print)
    standby = make_queue(meter_provider=others[1])
    recorder.record("GROUP_A", "USER_1")
    standby.record("GROUP_A", "USER_2")
    until(lambda: Collected(readers[1].get_metrics_data()).state() == "standby")
    per.set_fault(Status(503))
    until(lambda: collect().state() == "backing_off", 20)
    seen = [collect(), *(Collected(reader.get_metrics_data()) for reader in readers)]
    assert [each.state() for each in seen] == ["backing_off", "off", "standby"]
    assert [each("perqueue.drain.in_flight_limit") for each in seen] == [1, 0, 0]
    assert len({each.points[0][1]["perqueue.outbox.id"] for each in seen}) == 1
    for other in others:
        other.shutdown()


# --- Whose provider


def test_without_opentelemetry_nothing_is_imported_or_measured(env, per):
    """A program that has not loaded OpenTelemetry pays nothing for its being installed."""
    script = """
    queue = PerQueue()
    queue.record("GROUP", "USER").wait(10)
    say([name for name in sys.modules if "opentelemetry" in name or name == "perqueue._metrics"])
    say(queue._measures)
    queue.close()
    """
    with Child(script, env=env) as child:
        child.expect("[]")
        child.expect("None")
        child.succeed()


def test_the_global_provider_is_used_if_it_is_loaded(env, per):
    """A program that uses OpenTelemetry has metrics without an option, set up before the queue or after."""
    script = """
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    before = PerQueue()
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    after = PerQueue(sys.argv[1], drain=False)
    explicit = PerQueue(sys.argv[2], drain=False, meter_provider=metrics.get_meter_provider())
    before.record("GROUP", "USER").wait(10)
    after.record("GROUP", "USER")
    for queue in (after, after, explicit):
        queue.record("GROUP", "USER")
    for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
        if metric.name == "perqueue.outbox.recorded":
            say(sorted(point.value for point in metric.data.data_points))
    """
    here = env["PERQUEUE_OUTBOX"]
    with Child(script, f"{here}-2", f"{here}-3", env=env) as child:
        child.expect("[1, 1, 3]")
        child.succeed()


def test_two_providers_do_not_mix(make_queue, provider, collect, tmp_path):
    """Each queue is reported to its own provider, and to no other."""
    reader = InMemoryMetricReader()
    other = MeterProvider([reader], shutdown_on_exit=False)
    make_queue(tmp_path / "one.db", meter_provider=provider, drain=False)
    make_queue(tmp_path / "other.db", meter_provider=other, drain=False).record("GROUP_A", "USER_1")
    assert collect()("perqueue.outbox.recorded") == 0
    assert Collected(reader.get_metrics_data())("perqueue.outbox.recorded") == 1
    other.shutdown()


def test_metrics_can_be_turned_off(make_queue):
    """With OpenTelemetry's own provider that does nothing, nothing is measured."""
    assert "opentelemetry.metrics" in sys.modules
    assert make_queue(meter_provider=NoOpMeterProvider(), drain=False)._measures is None


def test_what_is_no_provider_is_refused(make_queue):
    """A mistake in the option is told at once."""
    with pytest.raises(ConfigurationError, match=r"opentelemetry\.metrics\.MeterProvider"):
        make_queue(meter_provider="prometheus")


def test_a_provider_without_opentelemetry_names_the_remedy(make_queue, provider, monkeypatch):
    """Where the package is missing the error says what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'useper-perqueue\[otel\]'"):
        make_queue(meter_provider=provider)


# --- Providers that are broken


class Broken(NoOpMeterProvider().__class__.__base__):
    """A provider whose every method raises."""

    def get_meter(self, *_, **__):
        raise RuntimeError("the meter is broken")


class Histogram:
    def __init__(self, record):
        self.record = record


def with_histograms(provider, record):
    """Return a provider whose histograms do something else."""
    meter = provider.get_meter("perqueue")

    class Meter:
        def create_histogram(self, *_, **__):
            return Histogram(record)

        def __getattr__(self, name):
            return getattr(meter, name)

    class Provider(metrics.MeterProvider):
        def get_meter(self, *_, **__):
            return Meter()

    return Provider()


def test_a_provider_that_raises_means_no_metrics(make_queue, caplog):
    """Recording and delivery go on without metrics, and one line says so."""
    queue = make_queue(meter_provider=Broken())
    queue.record("GROUP_A", "USER_1").wait(10)
    assert [r.getMessage() for r in caplog.records if r.name == "perqueue"] == [
        "there are no metrics: the meter provider raised RuntimeError"
    ]


def test_a_meter_that_raises_harms_nobody(make_queue, provider, collect):
    """An instrument that raises is noticed by whoever collects, never by record() or the drain."""

    def fail(*_):
        raise RuntimeError("the histogram is broken")

    queue = make_queue(meter_provider=with_histograms(provider, fail))
    for number in range(10):
        queue.record("GROUP_A", f"USER_{number}")
    queue.flush(10)
    seen = collect()
    assert seen("perqueue.outbox.delivered") == 10
    assert seen("perqueue.drain.requests", outcome="accepted") == 10


def test_a_meter_that_blocks_holds_up_nobody(make_queue, provider, collect, until):
    """While an instrument hangs for good, recording, delivery, stats, fork hooks and close() go on."""
    blocked, release = threading.Event(), threading.Event()

    def block(*_):
        blocked.set()
        release.wait(60)

    queue = make_queue(meter_provider=with_histograms(provider, block))
    queue.record("GROUP_A", "USER_0")
    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    try:
        assert blocked.wait(10)
        for number in range(100):
            queue.record("GROUP_A", f"USER_{number}")
        queue.flush(10)
        assert queue.stats().pending == 0
        queue.close()
    finally:
        release.set()
        collector.join(10)


LOCKED = """
from opentelemetry.metrics import NoOpMeterProvider

class Provider(NoOpMeterProvider().__class__.__base__):
    \"\"\"Its histograms take a lock that cannot be entered twice, as the SDK's do.\"\"\"

    def __init__(self):
        self.lock = threading.Lock()
        self.callbacks = []
        self.in_the_lock = lambda: None

    def get_meter(self, *_):
        return self

    def create_histogram(self, *_, **__):
        return self

    def record(self, *_):
        with self.lock:
            self.in_the_lock()

    def __getattr__(self, name):
        return lambda name, callbacks, *_: self.callbacks.extend(callbacks)

provider = Provider()
"""


def test_record_in_a_signal_handler_that_interrupts_the_meter(env, per):
    """A signal handler may record while its thread is inside a meter whose locks cannot be entered twice."""
    script = """
    queue = PerQueue(drain=False, meter_provider=provider)
    queue.record("GROUP", "USER")
    signal.signal(signal.SIGALRM, lambda *_: queue.record("GROUP", "HANDLER"))
    provider.in_the_lock = lambda: signal.raise_signal(signal.SIGALRM)
    provider.callbacks[0](None)
    say(queue.stats().pending)
    queue.close()
    """
    with Child(LOCKED + textwrap.dedent(script), env=env, measured=False) as child:
        child.expect("2")
        child.succeed()


# --- Forks


FORK = """
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
queue = PerQueue(meter_provider=MeterProvider([reader]))

def show(who):
    points = [
        (metric.name, point)
        for scope in reader.get_metrics_data().resource_metrics[0].scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    ]
    shown = {name: point.value for name, point in points if hasattr(point, "value")}
    on = [p.attributes["perqueue.drain.state"] for n, p in points if n == "perqueue.drain.status" and p.value]
    say(f"{who} {shown['perqueue.drain.requests']} {shown['perqueue.outbox.delivered']} {on}")

for n in range(5):
    queue.record("GROUP", f"USER_{n}")
queue.flush(10)
show("parent")
pid = os.fork()
if not pid:
    show("child")
    queue.record("GROUP", "CHILD").wait(10)
    os._exit(0)
os.waitpid(pid, 0)
show("parent")
queue.close()
"""


def test_a_forked_child_does_not_report_what_its_parent_did(env, per):
    """In the child the parent's requests are not counted again; of the outbox both say the same."""
    with Child(FORK, env={**env, "PYTHONWARNINGS": "ignore::DeprecationWarning"}, measured=False) as child:
        child.expect("parent 5 5 ['idle']")
        child.expect("child 0 5 ['off']")
        assert child.expect("parent ") in ("6 6 ['idle']", "5 6 ['idle']")
        child.succeed()


FORKED_INSIDE = """
queue = PerQueue(drain=False, meter_provider=provider)
queue.record("GROUP", "USER")
inside, stop = threading.Event(), threading.Event()
provider.in_the_lock = lambda: (inside.set(), stop.wait(30))
collector = threading.Thread(target=lambda: provider.callbacks[0](None))
collector.start()
inside.wait(10)
pid = os.fork()
if not pid:
    signal.alarm(10)
    queue.record("GROUP", "CHILD")
    os._exit(0)
say(os.waitpid(pid, 0)[1])
stop.set()
collector.join()
say(queue.stats().pending)
queue.close()
"""


def test_a_fork_while_metrics_are_collected(env, per):
    """A child forked while a thread is inside a meter records without a hang: it needs none of its locks."""
    env = {**env, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    with Child(LOCKED + FORKED_INSIDE, env=env, measured=False) as child:
        child.expect("0", timeout=20)
        child.expect("2")
        child.succeed(20)


PREFORK = """
from opentelemetry import metrics
queue = PerQueue(drain=False)
queue.record("GROUP", "PARENT")
pid = os.fork()
if not pid:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    queue.record("GROUP", "CHILD")
    for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
        (point, *_) = metric.data.data_points
        if metric.name == "perqueue.record.duration":
            say(f"recorded {point.count}")
        if metric.name == "perqueue.outbox.pending":
            say(f"pending {point.value}")
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
queue.close()
"""


def test_a_provider_that_is_set_up_after_a_fork(env, per):
    """A worker that a server forked sets metrics up for itself; a queue made before reports through them."""
    with Child(PREFORK, env={**env, "PYTHONWARNINGS": "ignore::DeprecationWarning"}, measured=False) as child:
        child.expect("recorded 1")
        child.expect("pending 2")
        child.succeed()
