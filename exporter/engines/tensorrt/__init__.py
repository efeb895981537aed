"""TensorRT: a bundle's static-cache graphs → verified engines (build.py), and sessions over them (session.py).

Full TensorRT (module `tensorrt`) and TensorRT for RTX (`tensorrt_rtx`) share one API and this code; api.py picks.
"""
