"""What an engine does to the counts, without a model: a pool in which blocks are only numbers."""

import numpy as np

from jaxkv import CacheConfig, KVCompress, Ratio, SamplingParams
from jaxkv.cache.prefix import Prefix
from jaxkv.engine.block_counts import Blocks
from jaxkv.engine.decisions import Join, Wait
from jaxkv.engine.prompt_plan import plan_prompt
from jaxkv.engine.scheduler import Scheduler
from jaxkv.engine.sequence import Sequence
from jaxkv.requests import Refused, Request

HEADS, SIZE = 4, 16
ONCE = KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8)
AGAIN = KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8, compress_every=12)
DOCUMENT = np.arange(1000, 1160, dtype=np.int32)


def config(blocks, rows=3, **settings):
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "max_context": 512, "block_size": SIZE}
    return CacheConfig(batch=rows, num_blocks=blocks + 1, **(sizes | settings))


def sequence(config, length, tokens=10, policy=None, index=0, begins=()):
    prompt = np.concatenate([begins, 10_000 * (index + 1) + np.arange(length)]).astype(np.int32)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    request = Request(index=index, prompt=prompt, params=params, limit=tokens, policy=policy)
    return Sequence(request, plan_prompt(request, config))


class Pool:
    """What an engine does to the counts, without a cache: blocks are only numbers here."""

    def __init__(self, config, *, share_prefixes=True, schedule=None, costs=None):
        self.config = config
        self.scheduler = Scheduler(config, share_prefixes=share_prefixes, schedule=schedule, costs=costs)
        self.steps = self.passes = self.asides = 0
        self.counts, self.refused, self.ended = self.scheduler.counts, [], []

    def look(self):
        """Counts what is free; what was promised has always been there."""
        held = sum(self.counts.held(row).raw for row in range(self.config.batch))
        lent = sum(HEADS * (shared.blocks - sum(shared.borrowed.values())) for shared in self.scheduler.prefixes)
        self.counts.free = self.counts.total - Blocks(raw=held + lent)
        assert self.counts.free.raw >= 0

    def grow(self, row, tokens):
        self.counts.raw_lengths[:, row] += tokens
        self.look()

    def leave(self, row):
        self.scheduler.leave(row)
        self.counts.raw_lengths[:, row] = 0
        self.look()

    def cut(self, prefixes):
        for shared in prefixes:
            self.scheduler.prefixes.cut(shared, Prefix(table=np.zeros(0), blocks=shared.in_use))
        self.look()

    def compress(self, row, tokens):
        kept = max(tokens // 3 // SIZE, 1) * SIZE
        self.counts.raw_lengths[:, row] = np.minimum(self.counts.raw_lengths[:, row], kept)
        self.look()

    def admit(self):
        match self.scheduler.next():
            case Refused() as refused:
                self.refused.append(self.scheduler.queue.popleft().index)
                assert refused.request == self.refused[-1]
            case Wait(cut=cut):
                self.cut(cut)
            case Join() as join:
                self.cut(join.cut)
                assert sum((joining.takes for joining in join.prompts), Blocks()) <= self.counts.free
                reading = self.scheduler.join(join)
                assert reading.rows[: len(reading.prompts)].tolist() == [prompt.row for prompt in reading.prompts]
                assert len(set(reading.rows)) == len(reading.rows) == reading.shape.rows
                for prompt in reading.prompts[len(join.rests) :]:
                    self.grow(prompt.row, prompt.read)

    def read(self):
        reading, scheduler = self.scheduler.reading, self.scheduler
        shape = scheduler.next_shape(reading)
        tokens, counts = reading.next_chunk(shape)
        self.passes += 1
        assert tokens.shape == (1, shape.tokens)
        expected = [prompt.ids[prompt.read : prompt.read + count] for prompt, count in reading.of_prompts(counts)]
        np.testing.assert_array_equal(tokens[0, : counts.sum()], np.concatenate(expected))
        for prompt, count in reading.of_prompts(counts):
            self.grow(prompt.row, count)
            prompt.read += count
        [*others, prompt] = reading.prompts
        policy, row = reading.policy, prompt.row
        if others:
            assert all(each.read == each.total for each in reading.prompts)
            assert max(counts) <= reading.shape.length
            assert all(each.sequence.request.policy == policy for each in others)
        if prompt.read == prompt.lend_tokens:
            scheduler.prefixes.lend(
                row, prompt.ids[: prompt.read], Prefix(table=np.zeros(0), blocks=prompt.read // SIZE)
            )
            self.look()
        if not prompt.part_is_read:
            self.asides += scheduler.set_aside() is not None
            return
        for each in [] if policy is None else reading.prompts:
            scheduler.prefixes.give_up(each.row)
            self.look()
            self.compress(each.row, each.total)
        if prompt.read < prompt.total:
            assert scheduler.parts_too_large(prompt) is None
            return
        scheduler.reading = None
        for each in reading.prompts:
            if scheduler.too_large(each.row) is not None:
                self.refused.append(each.sequence.index)
                self.leave(each.row)
            else:
                self.take(each.row, 1)

    def take(self, row, tokens):
        sequence = self.scheduler.sequence(row)
        sequence.take([7] * tokens, [0.0] * tokens)
        if sequence.finish_reason is not None:
            self.ended.append(sequence.index)
            self.leave(row)

    def decode(self):
        steps = self.scheduler.steps()
        if steps == 0:
            self.make_room()
            return
        self.steps += max(min(steps, self.scheduler.sequence(row).tokens_left) for row in self.scheduler.running)
        for row in self.scheduler.running:
            tokens = min(steps, self.scheduler.sequence(row).tokens_left)
            self.grow(row, tokens)
            self.take(row, tokens)

    def make_room(self):
        scheduler, before = self.scheduler, self.counts.free
        self.cut(scheduler.prefixes.unused())
        if not self.counts.free <= before:
            return
        for row in scheduler.whom_to_compress_again():
            sequence = scheduler.sequence(row)
            self.compress(row, len(sequence.request.prompt) + sequence.replayed)
        if not self.counts.free <= before:
            return
        taken = [s.order for s in scheduler.rows if s is not None]
        row = scheduler.whom_to_put_back()
        assert scheduler.sequence(row).order == max(taken) > min(taken), "the oldest goes on"
        scheduler.put_back(row)
        self.counts.raw_lengths[:, row] = 0
        self.look()
        assert scheduler.locked

    def run(self, sequences):
        waiting = list(sequences)
        for _ in range(5000):
            while waiting and self.scheduler.wants_requests:
                self.scheduler.queue.append(waiting.pop(0))
            self.admit()
            if self.scheduler.reading is not None:
                self.read()
                if not self.scheduler.schedule.alternates:
                    continue
            if self.scheduler.running:
                self.decode()
            elif self.scheduler.is_empty and not waiting:
                return
        raise AssertionError("it never ends")
