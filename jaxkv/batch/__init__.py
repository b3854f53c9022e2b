"""A file of prompts in, a file of answers out, whatever happens between."""

from jaxkv.batch.job import BatchJob as BatchJob
