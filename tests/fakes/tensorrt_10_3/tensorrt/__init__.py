"""TensorRT 10.3 on a Jetson Orin; see fake_tensorrt.py."""

import fake_tensorrt

__version__ = "10.3.0"
globals().update(fake_tensorrt.build_module("10.3"))
