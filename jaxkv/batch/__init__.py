"""A file of prompts in, a file of answers out, whatever happens between."""

from jaxkv.batch.job import BatchJob as BatchJob
from jaxkv.batch.workers import Workers as Workers
