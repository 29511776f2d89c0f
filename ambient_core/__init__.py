"""What every package uses and no package owns: errors, arguments, text formats, paths, storage, batches, seeds.

Imports nothing of this project; everything may import it.
"""
