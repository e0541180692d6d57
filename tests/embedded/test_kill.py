"""`kill -9` between the order and its commit, and minutes of everything at once: orders and bills agree."""

import json
import os
import random
import signal
import sqlite3
import time
from contextlib import closing

import pytest

from perqueue._outbox import OperatorOutbox
from tests.faults._rounds import rounds
from tests.helpers import Child, environment

SELL_UNTIL_KILLED = """
    import random, sqlite3, threading, filelock, perqueue._wire.exchange, perqueue._delivery.worker

    def sell(queue, run, how):
        connection = sqlite3.connect(os.environ["PERQUEUE_OUTBOX"], timeout=20, check_same_thread=False)
        n = 0
        while True:
            n += 1
            customer = f"{run}-{n}"
            if how == "before":
                queue.record("SHOP", customer)
                time.sleep(random.uniform(0, 0.01))
            connection.execute("INSERT INTO orders (customer) VALUES (?)", (customer,))
            if how == "joined":
                queue.record("SHOP", customer, connection=connection)
            time.sleep(random.uniform(0, 0.003))
            connection.rollback() if n % 7 == 0 and how == "joined" else connection.commit()
            if how == "after":
                time.sleep(random.uniform(0, 0.01))
                queue.record("SHOP", customer)

    while run := hear():
        if pid := os.fork():
            os.waitpid(pid, 0)
            say("dead")
            continue
        queue = PerQueue(embedded=True)
        threading.Thread(target=sell, args=(queue, run, sys.argv[1]), daemon=True).start()
        say(f"ready {os.getpid()}")
        time.sleep(60)
"""


def kill_at_random(env, how, runs):
    with Child(SELL_UNTIL_KILLED, how, env=env, measured=False) as child:
        for run in range(1, runs + 1):
            child.tell(run)
            pid = int(child.expect("ready"))
            time.sleep(random.uniform(0.03, 0.12))
            os.kill(pid, signal.SIGKILL)
            child.expect("dead")


def assert_sound(app, perqueue):
    with closing(OperatorOutbox(app, None, create=False)) as outbox:
        assert outbox.position().pending == 0
    found = json.loads(perqueue("doctor", "--json", "-o", app).output)["findings"]
    found = {each["about"]: each["level"] for each in found}
    assert {about: found[about] for about in ("structure", "rows", "books")} == {
        "structure": "ok",
        "rows": "ok",
        "books": "ok",
    }


@pytest.mark.timeout(rounds(120, 900))
def test_kill_9_neither_loses_nor_invents(app, embed, per, customers, billed, perqueue):
    """Killed between order and commit, again and again: billed is exactly who has an order."""
    embed().close()
    kill_at_random(environment(app, per), "joined", rounds(8, 300))
    embed().flush(60)
    assert customers()
    assert billed() == customers()
    assert_sound(app, perqueue)


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
@pytest.mark.parametrize(("how", "wrong"), [("before", "invents"), ("after", "loses")])
def test_control_recording_beside_the_transaction(app, embed, per, customers, billed, how, wrong):
    """The check sees a recorder that does not join: before the commit it invents, after it it loses."""
    embed().close()
    kill_at_random(environment(app, per), how, 8)
    embed().flush(60)
    invented, lost = billed() - customers(), customers() - billed()
    assert {"invents": invented, "loses": lost}[wrong]
    assert not {"invents": lost, "loses": invented}[wrong]


SELL_FOR_A_WHILE = """
    import random, sqlite3
    _, name, seconds, coalesces = sys.argv
    from datetime import timedelta
    queue = PerQueue(embedded=True, coalesce=timedelta(days=1) if coalesces == "True" else None)
    connection = sqlite3.connect(os.environ["PERQUEUE_OUTBOX"], timeout=30)
    end, n, locked = time.monotonic() + float(seconds), 0, 0
    plain = set()
    while time.monotonic() < end:
        n += 1
        connection.execute("SAVEPOINT purchase") if n % 3 == 0 else None
        for each in range(random.randint(1, 5)):
            customer = f"{name}-{n % 500 if coalesces == 'True' else n}-{each}"
            connection.execute("INSERT INTO orders (customer) VALUES (?)", (customer,))
            queue.record("SHOP", customer, connection=connection)
        if n % 3 == 0:
            connection.execute("ROLLBACK TO purchase")
        connection.rollback() if random.random() < 0.2 else connection.commit()
        if n % 10 == 0:
            try:
                queue.record("SHOP", f"plain-{name}-{n}")
                plain.add(f"plain-{name}-{n}")
            except OutboxError:  # others held the lock for a second: it is possibly stored
                locked += 1
    queue.close()
    connection.close()
    say(f"sold {n} {locked} {' '.join(plain)}")
    os._exit(0)
"""


@pytest.mark.parametrize("coalesces", [False, True])
@pytest.mark.timeout(rounds(120, 900))
def test_several_writers_at_once(app, embed, per, customers, billed, perqueue, coalesces):
    """Processes that sell, roll back, record beside it and deliver, all in one file: the books agree."""
    embed().close()
    env = environment(app, per)
    seconds = rounds(0.7, 120)
    children = [Child(SELL_FOR_A_WHILE, name, seconds, coalesces, env=env, measured=False) for name in "abc"]
    plain = set()
    for child in children:
        with child:
            _, _, *names = child.expect("sold", timeout=seconds + 60).split()
            plain.update(names)
    embed().flush(120)
    assert customers() <= billed()
    surplus = billed() - customers()
    assert plain <= surplus
    assert all(name.startswith("plain-") for name in surplus)
    assert_sound(app, perqueue)
    with closing(sqlite3.connect(app)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
