"""What a run costs before it is started: memory, arithmetic, time, traffic.

Imports trainer's config, diffusion, engine and models; training and the commands import it.
"""
