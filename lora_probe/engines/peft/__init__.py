"""The PEFT engine: runs base model and adapter in PEFT, and records both. Its files have the same names as those of the
vLLM plugin.
"""
