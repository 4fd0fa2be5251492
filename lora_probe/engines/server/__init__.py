"""The server engine: asks a running OpenAI-compatible server for its answers, in which nothing of lora-probe is
installed.

In: a URL, and the names of a base model and an adapter there. Out: a trace with answers, log-probabilities of the same
tokens with and without the adapter, and an `Outcome`: what they show of the adapter.
"""
