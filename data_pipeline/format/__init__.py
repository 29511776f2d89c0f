"""The files of a data set: tars, their index, arrays.

Imports ambient_core alone; every other folder of data_pipeline may import it.
"""
