"""A model that says what it is told to, letter by letter, and what Ctrl-C may do to it."""

import gc
import os
import signal

from batch.batch_fake import completion

from jaxkv.requests import Finished, SamplingParams, TextMade


class Speaker:
    def events(self, prompts, params):
        [prompt] = prompts
        if prompt == "interrupt":
            self._interrupt()
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
