"""The PEFT engine: runs base and adapter as PEFT runs them, and records both. Its files bear the names of the vLLM
plugin's.
"""
