"""Code that all packages share: errors, arguments, text formats, paths, storage, batches, seeds, progress bars.

It imports nothing else of this project. Every other package may import it.
"""
