"""A model that says what it is told to, letter by letter, and what Ctrl-C may do to it."""

import gc
import hashlib
import os
import signal
import sys
import threading

from batch.batch_fake import completion

from jaxkv.requests import Finished, SamplingParams, TextMade


class Speaker:
    compression = None

    def events(self, prompts, params):
        [prompt] = prompts
        if prompt == "interrupt":
            self._interrupt()
        if prompt == "compile":
            self._compile()
        for letter in prompt:
            yield TextMade(request=0, text=letter, token_ids=[0])
        yield self._finished(0, prompt)

    def run(self, jobs, *, max_context=None):
        for index, (prompt, _) in enumerate(jobs):
            yield self._finished(index, prompt)

    def _finished(self, index, prompt):
        made = completion(prompt[::-1], SamplingParams(max_tokens=10**6))
        return Finished(request=index, completion=type(made)(**vars(made) | {"text": prompt}))

    def _interrupt(self):
        """Within a callback as jax has one at each collection of garbage, which swallows exceptions."""

        def interrupt(phase, info):
            gc.callbacks.remove(interrupt)
            os.kill(os.getpid(), signal.SIGINT)

        gc.callbacks.append(interrupt)
        gc.collect()

    def _compile(self):
        """As a compiler does: for long in one call, without a look at what Python has to do."""
        within = threading.Timer(0.5, print, ["compiling"], {"file": sys.stderr, "flush": True})
        within.start()  # not told before the call has begun: until then Python has a say
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
