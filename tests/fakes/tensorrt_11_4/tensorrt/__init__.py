"""TensorRT 11.4 on a Jetson Orin; see fake_tensorrt.py."""

import fake_tensorrt

__version__ = "11.4.1"
globals().update(fake_tensorrt.build_module("11.4"))
