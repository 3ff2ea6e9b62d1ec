"""Latency of a plan on the GPU here: how the fastest of several engines is found."""

from __future__ import annotations

import statistics
import time
from typing import Any

from vggedge_runtime.cuda import primary_context
from vggedge_runtime.errors import EngineError
from vggedge_runtime.tensorrt_api import TensorRtApi, shared_logger

_WARM_UP = 20
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 100, 2000, 1.0
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, for which pycuda has no name


class EngineTimer:
    """Times plans for images of one size at one batch."""

    def __init__(self, api: TensorRtApi, image: tuple[int, int, int], batch: int) -> None:
        """Look for what timing takes.

        Args:
            api: TensorRT, which builds on the GPU that then runs.
            image: (height, width, 3).
            batch: the one that the profile is best at.

        Raises:
            MissingDependency: pycuda is not installed.
        """
        with primary_context():
            pass  # what is missing is missed now
        self._api, self._shape = api, (batch, *image)

    def measure(self, plan: memoryview) -> float:
        """Median time of an inference on the GPU, ms, without copies; after 20 to warm up, of 100 or 1 s of them.

        Raises:
            EngineError: the plan does not load, or does not run.
        """
        with primary_context() as driver:
            runtime = self._api.module.Runtime(shared_logger(self._api))
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise EngineError(f"{self._api.product} {self._api.version} does not load the engine that it built.")
            run = _Run(self._api, engine, driver)
            try:
                run.bind(self._shape)
                return statistics.median(run.sample())
            finally:
                run.close()  # before the engine, and that before the runtime
                del run, engine, runtime


class _Run:
    """An execution context with its buffers and stream."""

    def __init__(self, api: TensorRtApi, engine: Any, driver: Any) -> None:
        self._api, self._engine, self._driver = api, engine, driver
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{api.product} {api.version} has no memory to run the engine that it built.")
        # The plan is of detailed verbosity, which would make every enqueue slower.
        self._context.nvtx_verbosity = api.module.ProfilingVerbosity.NONE
        self._stream = driver.Stream(_NON_BLOCKING)
        self._buffers: list[Any] = []

    def bind(self, shape: tuple[int, ...]) -> None:
        """Give every input and output a buffer; inputs hold zeros, which cost a VGG as much as images do."""
        trt: Any = self._api.module
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        for name in names:
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self._check(self._context.set_input_shape(name, shape), f"the input shape {shape}")
        for name in names:
            pinned = self._driver.pagelocked_zeros(
                tuple(self._context.get_tensor_shape(name)), trt.nptype(self._engine.get_tensor_dtype(name))
            )
            device = self._driver.mem_alloc(pinned.nbytes)
            self._buffers.append(device)
            self._driver.memcpy_htod_async(device, pinned, self._stream)
            self._stream.synchronize()
            self._check(self._context.set_tensor_address(name, int(device)), f"a buffer for {name}")

    def sample(self) -> list[float]:
        """Times of single inferences, ms, between two events on the stream."""
        begin, end = self._driver.Event(), self._driver.Event()
        times: list[float] = []
        started = time.perf_counter()
        for index in range(_WARM_UP + _MOST_RUNS):
            begin.record(self._stream)
            self._check(self._context.execute_async_v3(self._stream.handle), "an inference")
            end.record(self._stream)
            end.synchronize()
            if index == _WARM_UP:
                started = time.perf_counter()
            if index >= _WARM_UP:
                times.append(end.time_since(begin))
            if len(times) >= _LEAST_RUNS and time.perf_counter() - started > _SECONDS:
                break
        return times

    def close(self) -> None:
        """Free the context, then the buffers."""
        self._stream.synchronize()
        self._context = None
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()

    def _check(self, answer: bool, what: str) -> None:
        if not answer:
            raise EngineError(f"{self._api.product} {self._api.version} refuses {what}; the engine cannot be timed.")
