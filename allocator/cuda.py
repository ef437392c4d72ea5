"""`VirtualMemory` on a CUDA device, using the driver's virtual memory management.

This is the only module that imports `cuda.bindings`, and only when a `Driver` is made. For the
calls and their rules, see https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html
"""

from collections.abc import Iterator, Sequence
from typing import Any

from batchrun.allocator.vmm import AllocatorError, Handle, OutOfPages, VirtualMemory

_HINTS = {
    "CUDA_ERROR_NO_DEVICE": "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "`nvidia-smi -L` lists the devices",
    "CUDA_ERROR_STUB_LIBRARY": "a stub libcuda.so.1 is found before the driver's own",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot, or reload the NVIDIA kernel module",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "update the NVIDIA driver",
}


class Driver:
    """The CUDA driver's functions, called by name; errors become exceptions.

    Attributes:
        types: the module `cuda.bindings.driver`, for its structures and enumerations.

    Raises:
        AllocatorError: the Python package, the driver or a device is missing.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver  # noqa: PLC0415 - this module must import without it
        except ImportError as error:
            raise AllocatorError(
                f"CUDA needs the Python package cuda-bindings ({error}); "
                "run `pip install cuda-bindings`"
            ) from error
        self.types = driver
        self.call("cuInit", 0)

    def call(self, name: str, *args: Any) -> Any:
        """Call one function. Returns its result, or a tuple if it has several.

        Raises:
            OutOfPages: the device or its driver is out of memory.
            AllocatorError: any other failure, with the error's name and number.
        """
        try:
            error, *results = getattr(self.types, name)(*args)
        except RuntimeError as problem:  # the bindings found no such function
            raise AllocatorError(self._missing(name, problem)) from problem
        if error != self.types.CUresult.CUDA_SUCCESS:
            _, text = self.types.cuGetErrorString(error)
            message = f"{name} failed with {error.name} ({int(error)}): {(text or b'').decode()}"
            if error.name in _HINTS:
                message += f"; {_HINTS[error.name]}"
            no_memory = error == self.types.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            raise (OutOfPages if no_memory else AllocatorError)(message)
        return results[0] if len(results) == 1 else tuple(results)

    def _missing(self, name: str, problem: Exception) -> str:
        if name == "cuInit":  # every driver has it, so the library itself is missing
            return f"no NVIDIA driver: {problem}; install one, or compute on the CPU"
        version = "unknown" if name == "cuDriverGetVersion" else self.call("cuDriverGetVersion")
        return f"the NVIDIA driver (CUDA version {version}) is too old: {problem}; update it"


class CudaMemory(VirtualMemory):
    """Pages of device memory, mapped into reservations of the unified address space.

    The device's primary context, which torch also uses, is retained until `close`. Any thread may
    call, one at a time; a call makes the context current in its thread and leaves it so.

    A page is one physical allocation of the driver, because nothing smaller can be unmapped. By
    default it has the driver's *minimum* granularity, the unit of all its rules (2 MiB on known
    devices). The recommended granularity may be larger, and larger pages waste more.

    Args:
        device: its number among those that CUDA_VISIBLE_DEVICES shows.
        page_size: bytes of a page in each plane, a multiple of the driver's minimum; None for the
            minimum.
        planes: parts of a page, each an allocation of its own.

    Raises:
        AllocatorError: there is no driver, no such device, or no virtual memory management on it.
    """

    def __init__(self, device: int = 0, *, page_size: int | None = None, planes: int = 1) -> None:
        self.driver = Driver()
        types, call = self.driver.types, self.driver.call
        self._device = call("cuDeviceGet", device)
        attribute = types.CUdevice_attribute
        supported = attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not call("cuDeviceGetAttribute", supported, self._device):
            raise AllocatorError(f"CUDA device {device} has no virtual memory management")
        self._properties = types.CUmemAllocationProp()
        self._properties.type = types.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access = types.CUmemAccessDesc()
        self._access.flags = types.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for location in (self._properties.location, self._access.location):
            location.type = types.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            location.id = int(self._device)
        minimum: int = call(
            "cuMemGetAllocationGranularity",
            self._properties,
            types.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        )
        super().__init__(minimum if page_size is None else page_size, planes)
        if self.granularity <= 0 or self.granularity % minimum:
            raise AllocatorError(
                f"page size {page_size} is not a positive multiple of the driver's {minimum}"
            )
        self._allocations: dict[Handle, list[Any]] = {}  # page -> the driver's handles, by plane
        self._context = call("cuDevicePrimaryCtxRetain", self._device)
        self._enter()

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the device, over all processes."""
        self.check_open()
        self._enter()
        free, total = self.driver.call("cuMemGetInfo")
        return int(free), int(total)

    def _reserve(self, size: int) -> int:
        self._enter()
        return int(self.driver.call("cuMemAddressReserve", size * self.planes, 0, 0, 0))

    def _free(self, address: int, size: int) -> None:
        self._enter()
        self.driver.call("cuMemAddressFree", address, size * self.planes)

    def _create(self, handles: Sequence[Handle]) -> None:
        self._enter()
        call, size, count = self.driver.call, self.granularity, len(handles)
        made: list[Any] = []
        try:
            for _ in range(count * self.planes):
                made.append(call("cuMemCreate", size, self._properties, 0))
        except AllocatorError as error:
            for allocation in made:
                call("cuMemRelease", allocation)
            if isinstance(error, OutOfPages):
                raise self._out_of_pages(count, error) from error
            raise
        for position, handle in enumerate(handles):
            begin = position * self.planes
            self._allocations[handle] = made[begin : begin + self.planes]

    def _destroy(self, handles: Sequence[Handle]) -> Iterator[Handle]:
        self._enter()
        for handle in handles:
            parts = self._allocations[handle]
            while parts:
                self.driver.call("cuMemRelease", parts[-1])
                parts.pop()
            del self._allocations[handle]
            yield handle

    def _map(self, address: int, handles: Sequence[Handle]) -> None:
        """Grants access to a plane's whole range in one call, as that call is the expensive one."""
        held = [self._allocations[handle] for handle in handles]
        self._enter()
        done: list[int] = []
        try:
            for plane, addresses in enumerate(self._of_planes(address, len(handles))):
                for at, allocations in zip(addresses, held, strict=True):
                    self.driver.call("cuMemMap", at, self.granularity, 0, allocations[plane], 0)
                    done.append(at)
                self._give_access(addresses.start, len(handles))
        except AllocatorError:
            for at in done:
                self.driver.call("cuMemUnmap", at, self.granularity)
            raise

    def _unmap(self, address: int, pages: Sequence[Handle]) -> None:
        """No work in progress on the device may use the range.

        The driver's documentation only promises to unmap a range that one call mapped, so every
        page is unmapped by its own call.
        """
        held = [self._allocations[page] for page in pages]
        self._enter()
        done: list[tuple[int, Any]] = []
        try:
            for plane, addresses in enumerate(self._of_planes(address, len(pages))):
                for at, allocations in zip(addresses, held, strict=True):
                    self.driver.call("cuMemUnmap", at, self.granularity)
                    done.append((at, allocations[plane]))
        except AllocatorError:
            for at, allocation in done:
                self.driver.call("cuMemMap", at, self.granularity, 0, allocation, 0)
                self._give_access(at, 1)
            raise

    def _close(self) -> None:
        """Makes every call before the first error is raised."""
        pages = (self._of_planes(at, 1) for at, _ in self.all_mapped())
        mapped = (addresses[0] for page in pages for addresses in page)
        allocated = (part for parts in self._allocations.values() for part in parts)
        reserved = self.reservations.items()
        calls: list[tuple[Any, ...]] = [
            *(("cuMemUnmap", address, self.granularity) for address in mapped),
            *(("cuMemRelease", allocation) for allocation in allocated),
            *(("cuMemAddressFree", at, held.size * self.planes) for at, held in reserved),
            ("cuDevicePrimaryCtxRelease", self._device),
        ]
        self._allocations.clear()
        errors: list[AllocatorError] = []
        self._enter()
        for call in calls:
            try:
                self.driver.call(*call)
            except AllocatorError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _enter(self) -> None:
        """Make the context current in the calling thread."""
        if int(self.driver.call("cuCtxGetCurrent")) != int(self._context):
            self.driver.call("cuCtxSetCurrent", self._context)

    def _of_planes(self, address: int, count: int) -> list[range]:
        """The addresses of a range of pages, plane by plane."""
        size = self.reservation_of(address)[1].size
        starts = range(address, address + size * self.planes, size)
        return [range(at, at + count * self.granularity, self.granularity) for at in starts]

    def _give_access(self, address: int, count: int) -> None:
        """Make mapped pages of one plane readable and writable."""
        size = count * self.granularity
        self.driver.call("cuMemSetAccess", address, size, [self._access], 1)

    def _out_of_pages(self, count: int, error: OutOfPages) -> OutOfPages:
        free, total = self.memory_info()
        return OutOfPages(
            f"{error}; {count} pages of {self.granularity * self.planes} bytes are needed, "
            f"{free} of {total} bytes are free on the device and {len(self._allocations)} pages "
            "are held; stop other programs on the device, or use a smaller KV budget"
        )
