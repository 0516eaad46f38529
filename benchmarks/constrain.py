"""What holding answers to the action language costs a token, at a vocabulary's full size.

A stand-in for AutoGLM-Phone-9B's vocabulary: 151,552 byte strings, the 256 single bytes and made-up
words. The samplers are the real ones, over random logits; nothing is evaluated. CPU time of one
thread, so that other work on the machine counts little.

    python benchmarks/constrain.py [--tokens 151552] [--answers 20]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.actions_grammar import compile_actions
from autoglm_gguf.config import SamplingParams
from autoglm_gguf.native.sampler import SamplerChain
from autoglm_gguf.sampling import ActionConstraint, ActionTokens, Vocabulary

ACTION = '<think>The button is in the middle.</think><answer>do(action="Tap", element=[512,87])'
TEXT = '<think>打字。</think><answer>do(action="Type", text="你好，世界。See you at 8, then?")'
ENGLISH = "etaoinshrdlucmfwypvbgkqjxz"
STOP = "</answer>"


class Words:
    """A vocabulary of made-up words, cut greedily: the longest token that fits comes first."""

    def __init__(self, n_vocab: int) -> None:
        rng = random.Random(0)
        words = {bytes([b]) for b in range(256)}
        pieces = ['"', '="', "(action", '",', " element", "=[", "],", '")', ")", "do", "<answer>"]
        words |= {piece.encode() for piece in [*pieces, "<think>", "</think>", STOP]}
        words |= {str(n).encode() for n in range(1000)}
        while len(words) < n_vocab:
            if rng.random() < 0.2:
                word = "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 4)))
            else:
                word = rng.choice(["", " "]) + "".join(rng.choices(ENGLISH, k=rng.randint(2, 12)))
            words.add(word.encode())
        self.tokens = sorted(words)
        self._ids = {word: n for n, word in enumerate(self.tokens)}
        self.stop = self._ids[STOP.encode()]

    def tokenize(self, text: str) -> list[int]:
        data, ids = text.encode(), list[int]()
        while data:
            n = next(n for n in range(min(len(data), 24), 0, -1) if data[:n] in self._ids)
            ids.append(self._ids[data[:n]])
            data = data[n:]
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]


class Chain:
    """llama.cpp's samplers over random logits that favour a script."""

    def __init__(self, words: Words, script: str, favour: float, seed: int) -> None:
        model: Any = SimpleNamespace(n_vocab=len(words.tokens))
        self._chain = SamplerChain(model, SamplingParams(frequency_penalty=0.2))
        self._script, self._favour = [*words.tokenize(script), words.stop], favour
        self._rng, self._at = np.random.default_rng(seed), 0
        self._logits = np.zeros(len(words.tokens), np.float32)
        self.seconds = 0.0

    def sample(self, among: NDArray[np.int32] | None = None) -> int:
        began = time.thread_time()
        context: Any = SimpleNamespace(logits=lambda _: self._logits)
        token = self._chain.sample(context, among)
        self.seconds += time.thread_time() - began
        return token

    def accept(self, token: int) -> None:
        began = time.thread_time()
        self._chain.accept(token)
        self.seconds += time.thread_time() - began
        self._at += self._at < len(self._script) - 1 and token == self._script[self._at]

    def evaluate(self) -> None:
        """As if a token had been evaluated: new logits."""
        self._logits = self._rng.standard_normal(len(self._logits), np.float32)
        self._logits[self._script[self._at]] += self._favour

    def close(self) -> None:
        self._chain.close()


def measure(words: Words, script: str, favour: float, n_answers: int) -> dict[str, list[float]]:
    """Milliseconds a sampled token, the samplers' own apart, and forced tokens an answer."""
    spent: dict[str, list[float]] = {"constraint": [], "sampler": [], "forced": []}
    for seed in range(n_answers):
        tokens = ActionTokens(words, len(words.tokens), frozenset([words.stop]), compile_actions())
        constraint, chain = ActionConstraint(tokens), Chain(words, script, favour, seed)
        n_forced, n_left = 0, 200
        while not constraint.complete and n_left > 0:
            chain.evaluate()
            chain.seconds = 0.0
            began = time.thread_time()
            taken = constraint.next_tokens(chain, n_left)
            all_seconds = time.thread_time() - began
            spent["constraint"].append(1000 * (all_seconds - chain.seconds))
            spent["sampler"].append(1000 * chain.seconds)
            n_left -= len(taken)
            n_forced += len(taken) - 1
        spent["forced"].append(n_forced)
        chain.close()
    return spent


def timed(what: str, work: Callable[[], Any]) -> Any:
    began = time.thread_time()
    result = work()
    print(f"{what}: {1000 * (time.thread_time() - began):.1f} ms")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=151_552)
    parser.add_argument("--answers", type=int, default=20)
    arguments = parser.parse_args()
    words = Words(arguments.tokens)
    automaton = timed("automaton, once an app list", compile_actions)
    trie = timed(
        "trie over the vocabulary, once a model, at the first refusal",
        lambda: Vocabulary([words.token_bytes(n) for n in range(len(words.tokens))]),
    )
    cold = []
    for state in range(len(automaton.table) - 1):
        began = time.thread_time()
        trie.allowed(automaton, state)
        cold.append(1000 * (time.thread_time() - began))
    print(
        f"allowed tokens of a state, first time: mean {statistics.mean(cold):.3f} ms, "
        f"worst {max(cold):.1f} ms ({len(cold)} states)"
    )
    for name, script, favour in (
        ("valid answer, checked only", ACTION, 100.0),
        ("valid text, checked only", TEXT, 100.0),
        ("random logits, masking", ACTION, 0.0),
    ):
        spent = measure(words, script, favour, arguments.answers)
        took = spent["constraint"]
        print(
            f"{name}: constraint median {statistics.median(took):.3f} ms, "
            f"mean {statistics.mean(took):.3f} ms, worst {max(took):.1f} ms; "
            f"sampler mean {statistics.mean(spent['sampler']):.3f} ms a token "
            f"({len(took)} sampled, {statistics.mean(spent['forced']):.0f} forced an answer)"
        )


if __name__ == "__main__":
    main()
