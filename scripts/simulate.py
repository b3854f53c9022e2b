"""What throughput the scheduler reaches on devices that aren't here: SIMULATED, nothing is measured.

    python scripts/simulate.py [--models llama-3.1-8b] [--devices l4] [--prompt 6000] [--answer 500] [--ratios 1 8 64]

The engine's own scheduler decides who is read and who is decoded, over blocks that are only counted; in place of a
model there is a clock, by which a pass or a step takes as long as its bytes, or its FLOPs, do at the device's published
rates, and each dispatch a millisecond of host time. All heads keep equal shares. Beside it the best static schedule by
the same costs: as many sequences as surely fit are read, all are decoded to the end, and so on.
"""

import argparse
import sys
from dataclasses import dataclass, field, replace

import numpy as np
from roofline import ITEM, USABLE, Work, weight_count
from targets import DEVICES, Device

from jaxkv import CacheConfig, KVCompress, Latency, Ratio, SamplingParams, Schedule, Throughput
from jaxkv.engine import costs
from jaxkv.engine.block_counts import Blocks
from jaxkv.engine.decisions import Join
from jaxkv.engine.prompt_plan import plan_prompt
from jaxkv.engine.reading import Reading
from jaxkv.engine.schedule import STEPS
from jaxkv.engine.scheduler import Scheduler
from jaxkv.engine.sequence import Sequence
from jaxkv.generation.prefill import CHUNK
from jaxkv.requests import Refused, Request
from models import LlamaConfig
from models.shapes import SHAPES

MODELS = {
    **SHAPES,
    "llama-3.1-70b": replace(
        SHAPES["llama-3.1-8b"], hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
    ),
}
HOST = 1e-3
"""Seconds between two dispatches."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Some devices that share a model evenly, without loss, and what the model costs on them."""

    model: LlamaConfig
    device: Device
    count: int
    block_size: int

    @classmethod
    def that_holds(cls, model: LlamaConfig, device: Device, block_size: int) -> "Machine":
        """As few devices, by powers of two, as have room for the weights and half as much again, or a fifth where it is
        one device."""
        count = 1
        while USABLE * device.memory * count < weight_count(model) * ITEM * (1.2 if count == 1 else 1.5):
            count *= 2
        return cls(model=model, device=device, count=count, block_size=block_size)

    @property
    def heads(self) -> int:
        return self.model.num_layers * self.model.num_kv_heads

    @property
    def block_bytes(self) -> int:
        """A block of every head, with scores and positions."""
        return self.heads * self.block_size * (2 * self.model.head_dim * ITEM + 8)

    @property
    def blocks(self) -> int:
        """That the pool has for each head."""
        return int((USABLE * self.device.memory * self.count - weight_count(self.model) * ITEM) // self.block_bytes)

    def seconds(self, work: Work) -> float:
        return work.seconds(self.device) / self.count

    def forward(self, tokens: int, attended: float, blocks: float) -> float:
        """A pass over so many tokens, which attend to so many KVs a head in all and read so many blocks of each."""
        model = self.model
        wide = model.num_layers * model.num_heads * model.head_dim
        return self.seconds(
            Work(
                bytes=weight_count(model, read=True) * ITEM + blocks * self.block_bytes,
                flops=2 * weight_count(model, read=True) * tokens + 4 * wide * attended,
            )
        )

    def step(self, rows: int, blocks: float) -> float:
        return self.forward(rows, blocks * self.block_size, blocks)

    def chunk(self, tokens: int, before: int) -> float:
        return self.forward(tokens, tokens * (before + tokens / 2), before / self.block_size)

    def compression(self, blocks: int, kept: int) -> float:
        return self.seconds(Work(bytes=(blocks + 2 * kept) * self.block_bytes, flops=0))


@dataclass(frozen=True, kw_only=True)
class SetUp:
    """Requests, all of one kind."""

    prompt: int
    answer: int
    ratio: float
    rows: int
    compress_every: int | None
    requests: int = 1

    @property
    def policy(self) -> KVCompress | None:
        if self.ratio == 1:
            return None
        return KVCompress(budget=Ratio(ratio=self.ratio), compress_every=self.compress_every)

    def kept(self, tokens: int, size: int) -> int:
        """Blocks a head that a sequence of so many tokens is compressed to."""
        full, policy = -(-tokens // size), self.policy
        return full if policy is None else max(int(full / self.ratio), -(-policy.protected_window // size))

    def most(self, size: int) -> int:
        """Blocks a head that a sequence holds at most once it is compressed."""
        more = -(-self.answer // size)
        if self.policy is not None and self.compress_every is not None:
            return self.kept(self.prompt + self.answer, size) + min(-(-self.compress_every // size) + 1, more)
        return self.kept(self.prompt, size) + more


@dataclass(kw_only=True)
class Ran:
    """What a schedule came to."""

    seconds: float = 0.0
    reading: float = 0.0
    steps: int = 0
    answers: int = 0
    tokens: int = 0
    refused: str | None = None

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_batch(self) -> float:
        """The first token of each answer is its prompt's, not a step's."""
        return (self.tokens - self.answers) / self.steps if self.steps else 0.0


@dataclass(kw_only=True)
class Simulation:
    """An engine whose model is a clock."""

    machine: Machine
    set_up: SetUp
    schedule: Schedule
    ran: Ran = field(default_factory=Ran)

    def __post_init__(self) -> None:
        context = self.set_up.prompt + self.set_up.answer
        self.config = CacheConfig(
            num_layers=1,  # one head stands for all
            num_kv_heads=1,
            head_dim=self.machine.model.head_dim,
            batch=self.set_up.rows,
            max_context=context,
            block_size=self.machine.block_size,
            num_blocks=self.machine.blocks + 1,
        )
        self.scheduler = Scheduler(self.config, share_prefixes=False, schedule=self.schedule)
        self.counts = self.scheduler.counts

    def run(self) -> Ran:
        waiting = iter(map(self._sequence, range(self.set_up.requests)))
        scheduler, ended = self.scheduler, False
        while self.ran.refused is None:
            while not ended and scheduler.wants_requests:
                sequence = next(waiting, None)
                ended = sequence is None
                if sequence is not None:
                    scheduler.queue.append(sequence)
            self._admit()
            if scheduler.reading is not None:
                self._read(scheduler.reading)
                if not scheduler.schedule.alternates:
                    continue
            if scheduler.running:
                self._decode()
            elif ended and scheduler.is_empty:
                break
        return self.ran

    def _sequence(self, index: int) -> Sequence:
        set_up = self.set_up
        params = SamplingParams(max_tokens=set_up.answer, temperature=0, repetition_penalty=1, ignore_eos=True)
        prompt = np.zeros(set_up.prompt, np.int32)
        request = Request(index=index, prompt=prompt, params=params, limit=set_up.answer, policy=set_up.policy)
        return Sequence(request, plan_prompt(request, self.config))

    def _admit(self) -> None:
        match self.scheduler.next():
            case Refused() as refused:
                self.ran.refused = refused.error
            case Join() as join:
                self.scheduler.join(join)

    def _hold(self, row: int, kvs: int) -> None:
        self.counts.raw_lengths[:, row] = kvs
        held = int((-(-self.counts.raw_lengths // self.config.block_size)).sum())
        self.counts.free = self.counts.total - Blocks(raw=held)
        if self.counts.free.raw < 0:
            raise RuntimeError("the scheduler gave what there is not")

    def _kvs(self, row: int) -> int:
        return int(self.counts.raw_lengths[0, row, 0])

    def _spend(self, seconds: float, *, reading: bool = False) -> None:
        self.ran.seconds += seconds
        self.ran.reading += seconds if reading else 0.0

    def _compress(self, row: int, tokens: int) -> float:
        size, before = self.config.block_size, self._kvs(row)
        kept = self.set_up.kept(tokens, size)
        self._hold(row, min(before, kept * size))
        return self.machine.compression(-(-before // size), kept)

    def _read(self, reading: Reading) -> None:
        shape = self.scheduler.next_shape(reading)
        _, counts = reading.next_chunk(shape)
        before = sum(self._kvs(prompt.row) for prompt in reading.prompts)
        seconds = self.machine.chunk(shape.tokens, before)
        self.scheduler.costs.note(costs.Work(shape, reading.policy), seconds)
        for prompt, count in reading.of_prompts(counts):
            self._hold(prompt.row, self._kvs(prompt.row) + count)
            prompt.read += count
        first = reading.prompts[0]
        if not first.part_is_read:
            self.scheduler.set_aside()
        elif reading.policy is not None:
            seconds += sum(self._compress(prompt.row, prompt.total) for prompt in reading.prompts)
        self._spend(seconds + HOST, reading=True)
        if first.read == first.total:
            self.scheduler.reading = None
            for prompt in reading.prompts:
                self._take(prompt.row, 1)

    def _take(self, row: int, tokens: int) -> None:
        sequence = self.scheduler.sequence(row)
        sequence.take([1] * tokens, [0.0] * tokens)
        if sequence.finish_reason is not None:
            self.ran.answers += 1
            self.ran.tokens += len(sequence.token_ids)
            self.scheduler.leave(row)
            self._hold(row, 0)

    def _decode(self) -> None:
        scheduler, every = self.scheduler, self.set_up.compress_every
        steps = scheduler.steps()
        if steps == 0:
            self._make_room()
            return
        for policy, rows in scheduler.dispatches():
            work = scheduler.work(rows, policy, steps)
            limits = {row: min(steps, scheduler.sequence(row).tokens_left) for row in rows}
            blocks = sum(-(-self._kvs(row) // self.config.block_size) for row in rows)
            seconds = max(limits.values()) * self.machine.step(work.size, blocks)
            for row, tokens in limits.items():
                self._hold(row, self._kvs(row) + tokens)
                sequence = scheduler.sequence(row)
                seen = self.set_up.prompt + sequence.replayed
                if policy is not None and every is not None and (seen + tokens) // every > seen // every:
                    seconds += self._compress(row, seen + tokens)
            self.ran.steps += max(limits.values())
            self._spend(seconds + HOST)
            scheduler.costs.note(work, seconds / max(limits.values()))
            scheduler.note_decoding(seconds)
            for row, tokens in limits.items():
                self._take(row, tokens)

    def _make_room(self) -> None:
        row = self.scheduler.whom_to_put_back()
        self.scheduler.put_back(row)
        self._hold(row, 0)


def best_static(machine: Machine, set_up: SetUp) -> tuple[float, int]:
    """Tokens a second and batch of the best schedule that reads a whole batch, then decodes it to its end."""
    size, best = machine.block_size, (0.0, 0)
    full, most = -(-set_up.prompt // size), set_up.most(size)
    reading = sum(machine.chunk(min(CHUNK, set_up.prompt - at), at) + HOST for at in range(0, set_up.prompt, CHUNK))
    if set_up.policy is not None:
        reading += machine.compression(full, set_up.kept(set_up.prompt, size))
    together = max(CHUNK // set_up.prompt, 1)  # short prompts, in one pass
    for batch in range(1, set_up.rows + 1):
        if max(batch * most, (batch - 1) * set_up.kept(set_up.prompt, size) + full) > machine.blocks:
            break
        begins = set_up.kept(set_up.prompt, size)
        held = (begins + min(begins + -(-set_up.answer // size), most)) / 2
        decoding = set_up.answer * (machine.step(batch, batch * held) + HOST / STEPS)
        best = max(best, (batch * set_up.answer / (-(-batch // together) * reading + decoding), batch))
    return best


def row(name: str, chip: str, set_up: SetUp, options: argparse.Namespace, first: list[float]) -> str:
    """Of the table; the first that fits is added to ``first``."""
    machine = Machine.that_holds(MODELS[name], DEVICES[chip], options.block_size)
    static, batch = best_static(machine, set_up)
    set_up = replace(set_up, requests=options.requests or 6 * max(batch, 1))
    schedule = Latency() if options.schedule == "latency" else Throughput()
    ran = Simulation(machine=machine, set_up=set_up, schedule=schedule).run()
    where = f"{machine.count} x {chip}" if machine.count > 1 else chip
    head = f"| {name} | {where} | {set_up.prompt} + {set_up.answer} | {set_up.ratio:g} |"
    if ran.refused is not None or not static:
        return f"{head} doesn't fit | | | | | | |"
    first.append(ran.tokens_a_second)
    bound = "reading" if ran.reading > ran.seconds / 2 else "rows" if ran.mean_batch > 0.9 * set_up.rows else "memory"
    return (
        f"{head} {ran.tokens_a_second:,.0f} | {ran.tokens_a_second / first[0]:.2f}x | {ran.mean_batch:.1f} | "
        f"{ran.reading / ran.seconds:.0%} | {bound} | {static:,.0f} ({batch}) | {ran.tokens_a_second / static:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["llama-3.1-8b"])
    parser.add_argument("--devices", nargs="+", choices=list(DEVICES), default=["l4"])
    parser.add_argument("--prompt", type=int, nargs="+", default=[6000], help="tokens")
    parser.add_argument("--answer", type=int, nargs="+", default=[500], help="tokens")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--requests", type=int, help="default: enough to fill the best static batch six times")
    parser.add_argument("--rows", type=int, default=512, help="most sequences at once (default: 512)")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--compress-every", type=int, default=64, help="0: only prompts are compressed (default: 64)")
    parser.add_argument("--schedule", choices=("throughput", "latency"), default="throughput")
    options = parser.parse_args()
    if min(options.prompt + options.answer) < 2 or min(options.ratios) < 1:
        sys.exit(f"expected prompts and answers of at least 2 tokens and ratios of at least 1, got {options}")
    print("SIMULATED, from published rates and counted bytes and FLOPs; nothing here is measured.\n")
    print(
        "| model | device | tokens | ratio | tokens/s | of ratio 1 | mean batch | reading | bound by "
        "| best static (batch) | of it |\n|" + " --- |" * 11
    )
    for name, chip, prompt, answer in (
        (n, c, p, a) for n in options.models for c in options.devices for p in options.prompt for a in options.answer
    ):
        first: list[float] = []
        for ratio in options.ratios:
            set_up = SetUp(
                prompt=prompt,
                answer=answer,
                ratio=ratio,
                rows=options.rows,
                compress_every=options.compress_every or None,
            )
            print(row(name, chip, set_up, options, first), flush=True)


if __name__ == "__main__":
    main()
