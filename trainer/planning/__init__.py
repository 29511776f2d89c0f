"""Estimates what a run costs before it is started: memory, FLOPs, time, network traffic.

Imports trainer's config, diffusion, engine and models; training and the commands import it.
"""
