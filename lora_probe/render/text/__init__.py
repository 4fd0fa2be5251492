"""What a person sees in a terminal, one file for each command. In: its result. Out: rich renderables."""
