# SPDX-License-Identifier: Apache-2.0
import asyncio
import time

import pytest

from internimage_deploy.runtime.serving.execution.batcher import Batcher
from internimage_deploy.runtime.serving.http_error import Refusal

FAR = float("inf")


class Runner:
    """Doubles numbers; holds every batch until `gate` is set; remembers the batches."""

    def __init__(self):
        self.batches = []
        self.gate = asyncio.Event()

    async def __call__(self, items):
        self.batches.append(list(items))
        await self.gate.wait()
        return [ValueError(str(item)) if item < 0 else item * 2 for item in items]


def batcher(runner, **options):
    settings = {"size": 4, "delay_s": 0.01, "queue": 100, "runners": 1, **options}
    return Batcher(runner, **settings)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0.01)


def test_pictures_of_one_key_run_together_up_to_the_size():
    async def scenario():
        runner = Runner()
        queue = batcher(runner)
        tasks = [asyncio.create_task(queue.submit(n, key="a", deadline=FAR)) for n in range(6)]
        await settle()
        assert runner.batches == [[0, 1, 2, 3]]
        runner.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [answer for answer, _ in answers] == [0, 2, 4, 6, 8, 10]
        assert runner.batches == [[0, 1, 2, 3], [4, 5]]
        assert [timing.batch for _, timing in answers] == [4, 4, 4, 4, 2, 2]

    asyncio.run(scenario())


def test_keys_are_never_mixed_and_the_longest_waiting_runs_first():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=2)
        tasks = [asyncio.create_task(queue.submit(n, key=n % 2, deadline=FAR)) for n in (1, 2, 4, 3, 6, 5)]
        await settle()
        runner.gate.set()
        await asyncio.gather(*tasks)
        assert runner.batches == [[2, 4], [1, 3], [6], [5]]

    asyncio.run(scenario())


def test_a_lone_picture_waits_for_the_delay_and_no_longer():
    async def scenario():
        runner = Runner()
        runner.gate.set()
        queue = batcher(runner, delay_s=0.05)
        _, timing = await queue.submit(1, key="a", deadline=FAR)
        assert timing.queue_s > 0.04
        assert timing.batch == 1

    asyncio.run(scenario())


def test_a_full_queue_refuses_with_a_time_to_come_back():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1, delay_s=0, queue=2)
        tasks = [asyncio.create_task(queue.submit(n, key="a", deadline=FAR)) for n in range(3)]
        await settle()
        assert queue.full
        with pytest.raises(Refusal) as refusal:
            await queue.submit(9, key="a", deadline=FAR)
        assert refusal.value.status == 503
        assert int(refusal.value.headers["Retry-After"]) >= 1
        runner.gate.set()
        await asyncio.gather(*tasks)
        assert not queue.full

    asyncio.run(scenario())


def test_a_picture_past_its_deadline_is_refused_while_the_network_is_busy():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1, delay_s=0)
        first = asyncio.create_task(queue.submit(1, key="a", deadline=FAR))
        await settle()
        with pytest.raises(Refusal, match="without a turn"):
            await queue.submit(2, key="a", deadline=time.monotonic() + 0.05)
        assert queue.waiting == 0
        runner.gate.set()
        assert (await first)[0] == 2
        assert runner.batches == [[1]]

    asyncio.run(scenario())


def test_a_caller_that_goes_away_leaves_the_queue():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1, delay_s=0)
        tasks = [asyncio.create_task(queue.submit(n, key="a", deadline=FAR)) for n in range(3)]
        await settle()
        tasks[1].cancel()
        await settle()
        assert queue.waiting == 1
        runner.gate.set()
        assert [answer for answer, _ in await asyncio.gather(tasks[0], tasks[2])] == [0, 4]
        assert runner.batches == [[0], [2]]

    asyncio.run(scenario())


def test_one_failure_in_a_batch_goes_to_its_caller_alone():
    async def scenario():
        runner = Runner()
        runner.gate.set()
        queue = batcher(runner)
        tasks = (queue.submit(n, key="a", deadline=FAR) for n in (1, -2, 3))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers[0][0] == 2
        assert isinstance(answers[1], ValueError)
        assert answers[2][0] == 6

    asyncio.run(scenario())


def test_a_batch_that_raises_answers_every_caller_and_the_next_batch_runs():
    async def scenario():
        calls = []

        async def run(items):
            calls.append(items)
            if len(calls) == 1:
                raise RuntimeError("broken")
            return items

        queue = batcher(run, size=2, delay_s=0.01)
        first = await asyncio.gather(*(queue.submit(n, key="a", deadline=FAR) for n in (1, 2)), return_exceptions=True)
        assert [str(error) for error in first] == ["broken", "broken"]
        assert (await queue.submit(3, key="a", deadline=FAR))[0] == 3

    asyncio.run(scenario())


def test_closing_finishes_what_waits_and_takes_nothing_new():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1, delay_s=0)
        tasks = [asyncio.create_task(queue.submit(n, key="a", deadline=FAR)) for n in range(3)]
        await settle()
        closing = asyncio.create_task(queue.close())
        await settle()
        with pytest.raises(Refusal, match="shutting down"):
            await queue.submit(9, key="a", deadline=FAR)
        runner.gate.set()
        await closing
        assert [answer for answer, _ in await asyncio.gather(*tasks)] == [0, 2, 4]

    asyncio.run(scenario())
