# SPDX-License-Identifier: Apache-2.0
import asyncio
import time

import pytest

from internimage_deploy.runtime.serving.execution.batcher import Batcher
from internimage_deploy.runtime.serving.http_error import HttpError
from support.served import WAIT_S

FAR = float("inf")
NEVER_S = 3600.0  # a delay after which nothing starts during a test


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
    settings = {"size": 4, "delay_s": 0, "runners": 1, **options}
    return Batcher(runner, **settings)


async def until(condition):
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0)


async def submit_each(queue, numbers, key=lambda _number: "a"):
    """One task for each number, submitted in order."""
    tasks = [asyncio.create_task(queue.submit(number, key=key(number), deadline=FAR)) for number in numbers]
    await asyncio.sleep(0)  # every task runs until it waits
    return tasks


def test_images_of_one_key_run_together_up_to_the_size():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, delay_s=NEVER_S)
        tasks = await submit_each(queue, range(6))
        await until(lambda: runner.batches)
        assert runner.batches == [[0, 1, 2, 3]]
        runner.gate.set()
        closing = asyncio.create_task(queue.close())  # so that the two that are left do not wait for others
        results = await asyncio.gather(*tasks)
        await closing
        assert [output for output, _ in results] == [0, 2, 4, 6, 8, 10]
        assert runner.batches == [[0, 1, 2, 3], [4, 5]]
        assert [timing.batch for _, timing in results] == [4, 4, 4, 4, 2, 2]

    asyncio.run(scenario())


def test_heavy_items_make_small_batches():
    """An image of three crops counts for three, and one of more than a whole batch runs alone."""

    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=6, delay_s=NEVER_S, weight=lambda number: {0: 3, 1: 7, 2: 1}[number % 10])
        queue._recent_run_s = 1.0
        tasks = await submit_each(queue, (0, 10, 20, 1, 11, 2, 12), key=lambda number: number % 10)
        await until(lambda: len(runner.batches) == 1)
        assert runner.batches == [[0, 10]]
        # Half a batch of the first kind, two of the second, a third of one of the third.
        assert queue.retry_after_s() == int(1 / 2 + 2 + 2 / 6) + 1
        closing = asyncio.create_task(queue.close())
        runner.gate.set()
        await asyncio.gather(*tasks)
        await closing
        assert runner.batches == [[0, 10], [20], [1], [11], [2, 12]]

    asyncio.run(scenario())


def test_keys_are_never_mixed_and_the_longest_waiting_runs_first():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=2, delay_s=NEVER_S)
        tasks = await submit_each(queue, (1, 2, 4, 3, 6, 5), key=lambda number: number % 2)
        closing = asyncio.create_task(queue.close())
        runner.gate.set()
        await asyncio.gather(*tasks)
        await closing
        assert runner.batches == [[2, 4], [1, 3], [6], [5]]

    asyncio.run(scenario())


def test_a_lone_image_waits_for_the_delay_and_no_longer():
    async def scenario():
        runner = Runner()
        runner.gate.set()
        queue = batcher(runner, delay_s=0.05)
        _, timing = await queue.submit(1, key="a", deadline=FAR)
        assert timing.queue_s > 0.04
        assert timing.batch == 1

    asyncio.run(scenario())


def test_the_time_to_come_back_grows_with_the_queue():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1)
        queue._recent_run_s = 0.5
        assert queue.retry_after_s() == 1
        tasks = await submit_each(queue, range(9))
        assert queue.waiting == 8
        assert queue.retry_after_s() == 5
        runner.gate.set()
        await asyncio.gather(*tasks)
        assert queue.retry_after_s() == 1

    asyncio.run(scenario())


def test_an_image_past_its_deadline_is_given_up_while_the_network_is_busy():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1)
        (first,) = await submit_each(queue, [1])
        await until(lambda: runner.batches)
        with pytest.raises(HttpError, match="without a turn") as error:
            await queue.submit(2, key="a", deadline=time.monotonic() + 0.05)
        assert error.value.status == 503
        assert int(error.value.headers["Retry-After"]) >= 1
        assert queue.waiting == 0
        runner.gate.set()
        assert (await first)[0] == 2
        assert runner.batches == [[1]]

    asyncio.run(scenario())


def test_a_caller_that_goes_away_leaves_the_queue():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1)
        tasks = await submit_each(queue, range(3))
        await until(lambda: queue.running == 1 and queue.waiting == 2)
        tasks[1].cancel()
        await until(lambda: queue.waiting == 1)
        runner.gate.set()
        assert [output for output, _ in await asyncio.gather(tasks[0], tasks[2])] == [0, 4]
        assert runner.batches == [[0], [2]]

    asyncio.run(scenario())


def test_one_failure_in_a_batch_goes_to_its_caller_alone():
    async def scenario():
        runner = Runner()
        runner.gate.set()
        queue = batcher(runner, size=3, delay_s=NEVER_S)
        tasks = await submit_each(queue, (1, -2, 3))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert runner.batches == [[1, -2, 3]]
        assert results[0][0] == 2
        assert isinstance(results[1], ValueError)
        assert results[2][0] == 6

    asyncio.run(scenario())


def test_a_batch_that_raises_fails_for_every_caller_and_the_next_batch_runs():
    async def scenario():
        calls = []

        async def run(items):
            calls.append(items)
            if len(calls) == 1:
                raise RuntimeError("broken")
            return items

        queue = batcher(run, size=2, delay_s=0.01)
        first = await asyncio.gather(*await submit_each(queue, (1, 2)), return_exceptions=True)
        assert [str(error) for error in first] == ["broken", "broken"]
        assert (await queue.submit(3, key="a", deadline=FAR))[0] == 3

    asyncio.run(scenario())


def test_closing_finishes_what_waits_and_takes_nothing_new():
    async def scenario():
        runner = Runner()
        queue = batcher(runner, size=1)
        tasks = await submit_each(queue, range(3))
        await until(lambda: runner.batches)
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(HttpError, match="shutting down"):
            await queue.submit(9, key="a", deadline=FAR)
        runner.gate.set()
        await closing
        assert [output for output, _ in await asyncio.gather(*tasks)] == [0, 2, 4]

    asyncio.run(scenario())
