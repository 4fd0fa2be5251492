"""The work of `parity`: a merged model against base plus adapter, in the weights and then in the outputs.

In: an adapter, a base and a merged model. Out: a `MergeReport` of the weights, and a `Parity` of both.
"""
