"""Outputs, one file each. In: the types of the core. Out: something to look at (`terminal`) or to parse (`machine`)."""
