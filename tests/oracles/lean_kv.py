"""LeanKV in plain numpy, one head and one token at a time, written from the paper and the authors' four-case rule."""

from dataclasses import dataclass

import numpy as np

f32 = np.float32


def quantise(vector: np.ndarray, bits: int, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Codes and decoded values of one vector."""
    codes, decoded = [], []
    for part in np.split(vector.astype(f32), groups):
        low, high = part.min(), part.max()
        scale = (high - low) / f32(2**bits - 1)
        inverse = f32(1) / scale if scale > 0 else f32(0)
        code = np.clip(np.rint((part - low) * inverse), 0, 2**bits - 1)
        codes.append(code.astype(np.uint32))
        decoded.append(code.astype(f32) * f32(np.float16(scale)) + f32(np.float16(low)))
    return np.concatenate(codes), np.concatenate(decoded)


@dataclass
class Token:
    """A KV of one head, as it is stored."""

    key: np.ndarray
    value: np.ndarray
    score: float
    position: int
    """Since when queries have been counted."""
    place: int
    """In the text; a test's name for the token."""


@dataclass
class Head:
    """One head's two tiers. Formats are (key bits, value bits, key groups, value groups)."""

    high_format: tuple
    low_format: tuple
    alpha_high: float
    alpha_low: float
    window: int
    high: list
    low: list

    def store(self, key, value, fmt):
        return quantise(key, fmt[0], fmt[2])[1], quantise(value, fmt[1], fmt[3])[1]

    def prompt(self, keys, values, mass):
        """``mass [group, tokens]``: attention summed over the last 64 queries."""
        count = len(keys)
        for i in range(count):
            queries = min(count - i, 64)
            score = mass[:, i].max()
            mean = score / queries
            if i >= count - self.window or mean >= self.alpha_high / count:
                tier, fmt = self.high, self.high_format
            elif mean >= self.alpha_low / count:
                tier, fmt = self.low, self.low_format
            else:
                continue
            tier.append(Token(*self.store(keys[i], values[i], fmt), score, count - queries, i))

    def weakest(self, tier, p):
        """Index and mean of a tier's least significant token outside the window."""
        found, least = None, np.inf
        for i, token in enumerate(tier):
            if p - token.position >= self.window:
                mean = token.score / (p - token.position)
                if mean < least:
                    found, least = i, mean
        return found, least

    def step(self, key, value, p):
        """The policy, then the new token at position ``p``; gives the case."""
        new = Token(*self.store(key, value, self.high_format), 0.0, p, p)
        if len(self.high) + len(self.low) + 1 <= self.window:
            self.high.append(new)
            return 0
        (vh, mh), (vl, ml) = self.weakest(self.high, p), self.weakest(self.low, p)
        low, high = self.alpha_low / p, self.alpha_high / p
        if mh < low and mh < ml:
            self.high[vh] = new
            return 1
        if mh < high:
            old = self.high[vh]
            moved = Token(*self.store(old.key, old.value, self.low_format), old.score, old.position, old.place)
            case = 2 if ml < low else 3
            if case == 2:
                self.low[vl] = moved
            else:
                self.low.append(moved)
            self.high[vh] = new
            return case
        self.high.append(new)
        return 4

    def attend(self, queries):
        """``[group, d]`` queries over both tiers; scores grow by the group's highest probability."""
        tokens = self.high + self.low
        keys, values = np.stack([t.key for t in tokens]), np.stack([t.value for t in tokens])
        logits = queries.astype(np.float64) @ keys.T.astype(np.float64) / np.sqrt(queries.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        for token, probability in zip(tokens, weights.max(0), strict=True):
            token.score += probability
        return weights @ values
