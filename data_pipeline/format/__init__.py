"""The files of a data set: tars, their index, arrays.

It imports only ambient_core. Every other folder of data_pipeline may import it.
"""
