"""Many requests in one cache, on the host: who joins, what is read, what is decoded, who is put back."""

from jaxkv.engine.engine import Engine as Engine
