"""Block offload of the emulated transformer: Nunchaku's behaviour, with the traps it has."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwenlora.emulation import CPUOffloadManager, Precision
from qwenlora.emulation.offload import copy_params_into

COUNTS = [(blocks, resident) for blocks in (2, 3, 5) for resident in range(1, blocks + 1)]
SLOT = "attn.to_out.0"


def widen(block: nn.Module, rank: int, seed: int = 0) -> None:
    """Give one slot more rank, as composing does: new tensors under the old parameters."""
    layer: Any = block.get_submodule(SLOT)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (layer.proj_down, layer.proj_up):
        added = 0.1 * torch.randn(parameter.shape[0], rank, generator=generator)
        parameter.data = torch.cat([parameter.data, added.to(parameter)], dim=1)


def offload(model: Any, **options: Any) -> CPUOffloadManager:
    """Turn offload on, on the CPU wherever the test runs."""
    model.set_offload(True, **{"device": "cpu", "use_pin_memory": False} | options)
    manager = model.offload_manager
    assert isinstance(manager, CPUOffloadManager)
    return manager


def storages(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}


@pytest.fixture
def model(make_model: Any) -> Any:
    return make_model(num_layers=3)


class TestForward:
    @pytest.mark.parametrize(("blocks", "resident"), COUNTS)
    def test_equals_the_resident_one(
        self, make_model: Any, probe: Any, blocks: int, resident: int
    ) -> None:
        model = make_model(num_layers=blocks, seed=blocks)
        expected = probe.output(model)
        manager = offload(model, num_blocks_on_gpu=resident)
        for forwards in (1, 2, 3):
            assert torch.equal(probe.output(model), expected)
            assert (manager.current_block_idx, manager.forward_counter) == (0, forwards)

    def test_equals_the_resident_one_in_w4a4(self, make_model: Any, probe: Any) -> None:
        model = make_model(num_layers=4, precision=Precision.W4A4, dtype=torch.bfloat16)
        expected = probe.output(model)
        offload(model)
        assert torch.equal(probe.output(model), expected)

    def test_more_resident_blocks_than_there_are(self, model: Any, probe: Any) -> None:
        expected = probe.output(model)
        manager = offload(model, num_blocks_on_gpu=9)
        manager.bytes_per_forward = []
        assert torch.equal(probe.output(model), expected)
        assert manager.bytes_per_forward == [0]

    def test_offloaded_blocks_are_never_called(self, model: Any, probe: Any) -> None:
        manager = offload(model, num_blocks_on_gpu=2)
        blocks = list(model.transformer_blocks)
        called: list[nn.Module] = []
        for block in (*blocks, *manager.buffer_blocks):
            block.register_forward_pre_hook(lambda module, args: called.append(module))
        probe.output(model)
        assert called == [blocks[0], blocks[1], manager.buffer_blocks[0]]

    def test_nothing_of_an_earlier_forward_survives(self, model: Any, probe: Any) -> None:
        manager = offload(model)
        probe.output(model)
        with torch.no_grad():
            for block in manager.buffer_blocks:
                for parameter in block.parameters():
                    parameter.fill_(float("nan"))
            for parameter in model.transformer_blocks[2].parameters():
                parameter.mul_(0.5)
        found = probe.output(model)
        model.set_offload(False)
        assert torch.equal(found, probe.output(model))

    def test_a_replaced_block_is_seen(self, model: Any, make_model: Any, probe: Any) -> None:
        offload(model)
        model.transformer_blocks[1] = make_model(seed=7).transformer_blocks[0]
        found = probe.output(model)
        model.set_offload(False)
        assert torch.equal(found, probe.output(model))

    def test_an_aborted_forward_puts_later_ones_out_of_step(
        self, make_model: Any, probe: Any
    ) -> None:
        # Nunchaku's `initialize` does not go back to block 0, either.
        model = make_model(num_layers=5)
        expected = probe.output(model)
        manager = offload(model)

        def fail(module: nn.Module, args: Any) -> None:
            raise InterruptedError

        handle = manager.buffer_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            probe.output(model)
        handle.remove()
        assert manager.current_block_idx == 2
        for _ in range(2):
            assert not torch.equal(probe.output(model), expected)
            assert manager.current_block_idx == 2
        manager.current_block_idx = 0
        assert torch.equal(probe.output(model), expected)

    def test_buffers_made_in_inference_mode_bind_forwards_to_it(
        self, model: Any, probe: Any
    ) -> None:
        expected = probe.output(model)
        with torch.inference_mode():
            offload(model)
            assert torch.equal(probe.output(model), expected)
        with pytest.raises(RuntimeError, match="inference tensor"):
            probe.output(model)

    def test_bytes_are_counted_on_demand(self, model: Any, probe: Any) -> None:
        manager = offload(model)
        probe.output(model)
        assert manager.bytes_per_forward is None
        manager.bytes_per_forward = counted = []
        probe.output(model)
        probe.output(model)
        base = sum(p.nbytes for b in model.transformer_blocks[1:] for p in b.parameters())
        assert counted == [base, base]
        for block in (*model.transformer_blocks, *manager.buffer_blocks):
            widen(block, 16)
        probe.output(model)
        layer = model.transformer_blocks[1].get_submodule(SLOT)
        added = 2 * 16 * (layer.in_features + layer.out_features) * 4
        assert counted == [base, base, base + added]


class TestManager:
    def test_buffers_are_copies_of_block_0(self, model: Any, probe: Any) -> None:
        manager = offload(model)
        assert manager.blocks is model.transformer_blocks
        first, second = manager.buffer_blocks
        wanted = probe.snapshot(model.transformer_blocks[0])
        assert not probe.snapshot(first).differences(wanted)
        assert not probe.snapshot(second).differences(wanted)
        modules = (first, second, *model.transformer_blocks)
        assert len(set.union(*map(storages, modules))) == sum(len(storages(m)) for m in modules)

    def test_buffers_are_no_part_of_the_model(self, model: Any) -> None:
        before = list(model.state_dict()), len(list(model.modules()))
        offload(model)
        assert (list(model.state_dict()), len(list(model.modules()))) == before

    def test_get_block(self, make_model: Any) -> None:
        model = make_model(num_layers=5)
        manager = offload(model, num_blocks_on_gpu=2)
        even, odd = manager.buffer_blocks
        blocks = model.transformer_blocks
        wanted = [blocks[0], blocks[1], even, odd, even]
        assert [manager.get_block(index) for index in range(5)] == wanted
        for block in wanted:
            assert manager.get_block() is block
            manager.step()
        assert manager.get_block() is blocks[0]

    @pytest.mark.parametrize("index", [0, 1, 5, 6])
    def test_load_block_leaves_out_resident_and_absent_ones(
        self, make_model: Any, index: int
    ) -> None:
        manager = offload(make_model(num_layers=5), num_blocks_on_gpu=2)
        manager.bytes_per_forward = []
        manager.load_block(index)
        assert manager.bytes_per_forward == []

    def test_load_block_copies_one_block_into_one_buffer(self, model: Any, probe: Any) -> None:
        manager = offload(model)
        manager.load_block(1)
        blocks = [probe.snapshot(block) for block in model.transformer_blocks]
        assert not probe.snapshot(manager.buffer_blocks[1]).differences(blocks[1])
        assert not probe.snapshot(manager.buffer_blocks[0]).differences(blocks[0])

    def test_plain_lists_and_strings(self) -> None:
        blocks: list[nn.Module] = [nn.Linear(2, 2) for _ in range(3)]
        manager = CPUOffloadManager(blocks, device="cpu", use_pin_memory=False)
        assert manager.device == torch.device("cpu")
        assert manager.memory_stream is manager.compute_done is manager.memory_done is None
        x, expected = torch.ones(1, 2), torch.ones(1, 2)
        manager.initialize()
        for index, block in enumerate(blocks):
            x, expected = manager.get_block(index)(x), block(expected)
            manager.step()
        assert torch.equal(x, expected)

    def test_names_are_nunchakus(self) -> None:
        own = {"bytes_per_forward"}
        manager = CPUOffloadManager([nn.Linear(2, 2)], device="cpu")
        assert set(vars(manager)) - own == {
            "blocks",
            "use_pin_memory",
            "on_gpu_modules",
            "num_blocks_on_gpu",
            "memory_stream",
            "compute_done",
            "memory_done",
            "buffer_blocks",
            "device",
            "current_block_idx",
            "forward_counter",
            "empty_cache_freq",
        }
        arguments = {
            CPUOffloadManager.__init__: "blocks device use_pin_memory on_gpu_modules"
            " num_blocks_on_gpu empty_cache_freq",
            CPUOffloadManager.set_device: "device force",
            CPUOffloadManager.load_block: "block_idx non_blocking",
            CPUOffloadManager.step: "compute_stream",
            CPUOffloadManager.get_block: "block_idx",
            CPUOffloadManager.initialize: "stream",
        }
        for method, names in arguments.items():
            assert list(inspect.signature(method).parameters) == ["self", *names.split()]

    def test_other_arguments_raise(self) -> None:
        with pytest.raises(ValueError, match="`num_blocks_on_gpu` must be at least 1, got: 0"):
            CPUOffloadManager([nn.Linear(2, 2)], device="cpu", num_blocks_on_gpu=0)
        with pytest.raises(ValueError, match="must be a CPU or CUDA device, got: meta"):
            CPUOffloadManager([nn.Linear(2, 2)], device="meta")


class TestTraps:
    """What code that composes LoRAs under offload runs into, here as in Nunchaku."""

    @pytest.mark.parametrize("widened", ["one block", "all blocks", "buffers"])
    def test_another_rank_than_the_buffers_raises(
        self, model: Any, probe: Any, widened: str
    ) -> None:
        manager = offload(model)
        modules = {
            "one block": [model.transformer_blocks[2]],
            "all blocks": [*model.transformer_blocks],
            "buffers": manager.buffer_blocks,
        }
        for module in modules[widened]:
            widen(module, 16)
        with pytest.raises(RuntimeError, match="size of tensor"):
            probe.output(model)

    def test_one_rank_everywhere_fits(self, model: Any, probe: Any) -> None:
        manager = offload(model)
        for index, block in enumerate((*model.transformer_blocks, *manager.buffer_blocks)):
            widen(block, 16, seed=index)
        found = probe.output(model)
        model.set_offload(False)
        assert torch.equal(found, probe.output(model))
        # A manager made after the change has buffers of the new size.
        offload(model)
        assert torch.equal(found, probe.output(model))

    def test_the_rank_of_a_resident_block_is_its_own(self, model: Any, probe: Any) -> None:
        offload(model, num_blocks_on_gpu=2)
        widen(model.transformer_blocks[0], 16)
        widen(model.transformer_blocks[1], 48)
        found = probe.output(model)
        model.set_offload(False)
        assert torch.equal(found, probe.output(model))
        # But the buffers of the next manager are copies of block 0.
        offload(model)
        with pytest.raises(RuntimeError, match="size of tensor"):
            probe.output(model)

    def test_one_row_is_broadcast_into_many(self) -> None:
        source, target = nn.Module(), nn.Module()
        source.register_buffer("down", torch.ones(1, 3))
        target.register_buffer("down", torch.zeros(4, 3))
        copy_params_into(source, target)
        assert torch.equal(target.down, torch.ones(4, 3))

    def test_values_are_cast_to_the_buffers_dtype(self) -> None:
        source, target = nn.Module(), nn.Module()
        source.register_buffer("down", torch.full((2,), 1.001))
        target.register_buffer("down", torch.zeros(2, dtype=torch.bfloat16))
        copy_params_into(source, target)
        assert torch.equal(target.down, torch.ones(2, dtype=torch.bfloat16))

    def test_buffers_on_one_side_are_left_out(self, model: Any, probe: Any) -> None:
        manager = offload(model)
        expected = probe.output(model)
        block = model.transformer_blocks[1]
        block.register_buffer("extra", torch.ones(3), persistent=False)
        assert torch.equal(probe.output(model), expected)
        assert not list(manager.buffer_blocks[1].buffers())

    @pytest.mark.parametrize("register", ["register_buffer", "register_parameter"])
    def test_a_tensor_on_one_side_shifts_all_after_it(self, register: str) -> None:
        source, target = (nn.ModuleDict({"a": nn.Module(), "b": nn.Module()}) for _ in range(2))

        def put(module: nn.Module, name: str, value: float) -> None:
            tensor = torch.full((2,), value)
            if register == "register_parameter":
                tensor = nn.Parameter(tensor, requires_grad=False)
            getattr(module, register)(name, tensor)

        put(source["b"], "down", 2.0)
        put(target["b"], "down", 0.0)
        copy_params_into(source, target)
        assert float(target["b"].down[0]) == 2.0
        put(source["a"], "down", 1.0)
        copy_params_into(source, target)
        assert float(target["b"].down[0]) == 1.0

    def test_order_counts_and_names_do_not(self) -> None:
        source, target = nn.Module(), nn.Module()
        for module, names in ((source, ("down", "up")), (target, ("up", "down"))):
            for name in names:
                module.register_buffer(name, torch.full((2,), float(name == "up")))
        copy_params_into(source, target)
        assert (float(target.down[0]), float(target.up[0])) == (1.0, 0.0)

    def test_a_shared_tensor_counts_once(self) -> None:
        source, target = nn.Module(), nn.Module()
        zeros = torch.zeros(2)
        for name, value in (("a", zeros), ("b", zeros), ("c", torch.ones(2))):
            source.register_buffer(name, value)
            target.register_buffer(name, torch.full((2,), 5.0))
        copy_params_into(source, target)
        assert [float(tensor[0]) for tensor in target.buffers()] == [0.0, 1.0, 5.0]

    def test_a_buffer_that_is_none_does_not_count(self) -> None:
        source, target = nn.Module(), nn.Module()
        source.register_buffer("a", None)
        target.register_buffer("a", torch.zeros(2))
        for module in (source, target):
            module.register_buffer("b", torch.ones(2))
        copy_params_into(source, target)
        assert torch.equal(target.a, torch.ones(2))

    def test_wtscale_travels_and_no_other_attribute(self) -> None:
        source, target = nn.Linear(2, 2), nn.Linear(2, 2)
        for number, module in enumerate((source, target)):
            module.wtscale = module.scale = float(number)
            module.lora = torch.full((2,), float(number))
        copy_params_into(source, target)
        assert (target.wtscale, target.scale, float(target.lora[0])) == (0.0, 1.0, 1.0)
        del target.wtscale
        with pytest.raises(AssertionError, match="only one has a `wtscale`"):
            copy_params_into(source, target)

    def test_a_forward_in_a_closure_stays_with_block_0(self, model: Any, probe: Any) -> None:
        # As a patched `module.forward` does: the copies call the layer that the closure holds.
        for block in model.transformer_blocks:
            layer = block.get_submodule(SLOT)
            layer.forward = lambda x, forward=layer.forward: forward(x)
        expected = probe.output(model)
        offload(model)
        found = probe.output(model)
        assert not torch.equal(found, expected)
        # Every offloaded block ran with the layer of block 0.
        model.set_offload(False)
        first = model.transformer_blocks[0].get_submodule(SLOT)
        for block in model.transformer_blocks[1:]:
            block.get_submodule(SLOT).forward = first.forward
        assert torch.equal(found, probe.output(model))

    def test_hooks_of_block_0_are_copied_and_later_ones_are_not(self, model: Any) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None: ...

        layers = [block.get_submodule(SLOT) for block in model.transformer_blocks]
        layers[0].register_forward_hook(hook)
        manager = offload(model)
        buffer = manager.buffer_blocks[1].get_submodule(SLOT)
        assert list(buffer._forward_hooks.values()) == [hook]
        layers[0].register_forward_hook(hook)
        layers[1].register_forward_hook(hook)
        assert len(buffer._forward_hooks) == 1


class TestTransformer:
    def test_attributes(self, model: Any) -> None:
        assert (model.offload, model.offload_manager) == (False, None)
        model.set_offload(True, device="cpu", num_blocks_on_gpu=2, a_later_option=1)
        manager = model.offload_manager
        assert model.offload
        assert (manager.num_blocks_on_gpu, manager.use_pin_memory) == (2, True)

    def test_turned_on_again_keeps_the_manager(self, model: Any) -> None:
        manager = offload(model)
        model.set_offload(True, num_blocks_on_gpu=2)
        assert model.offload_manager is manager
        assert manager.num_blocks_on_gpu == 1

    def test_turned_off_leaves_blocks_where_they_are(self, model: Any, probe: Any) -> None:
        expected = probe.output(model)
        offload(model)
        probe.output(model)
        before = probe.addresses(model)
        model.set_offload(False)
        assert (model.offload, model.offload_manager) == (False, None)
        assert probe.addresses(model) == before
        assert torch.equal(probe.output(model), expected)

    def test_deep_copy(self, model: Any, probe: Any) -> None:
        manager = offload(model)
        expected = probe.output(model)
        twin = copy.deepcopy(model)
        assert twin.offload_manager is not manager
        assert twin.offload_manager.blocks is twin.transformer_blocks
        modules = (model, twin, *manager.buffer_blocks, *twin.offload_manager.buffer_blocks)
        assert len(set.union(*map(storages, modules))) == sum(len(storages(m)) for m in modules)
        with torch.no_grad():
            for parameter in twin.transformer_blocks[1].parameters():
                parameter.mul_(0.5)
        assert torch.equal(probe.output(model), expected)
        assert not torch.equal(probe.output(twin), expected)

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_to_moves_nothing_under_offload(self, model: Any, device: Any) -> None:
        offload(model)
        with pytest.warns(UserWarning, match="offload is on"):
            assert model.to(device) is model
        with pytest.warns(UserWarning, match="offload is on"):
            assert model.to(device=device, dtype=torch.bfloat16) is model
        assert model.dtype is torch.float32
        assert model.to(torch.bfloat16).dtype is torch.bfloat16
        model.set_offload(False)
        assert model.to(device) is model


@pytest.mark.gpu
class TestCuda:
    """The same with two memories, a side stream and pinned tensors."""

    @pytest.fixture
    def model(self, make_model: Any) -> Any:
        return make_model(num_layers=5, precision=Precision.W4A4, dtype=torch.bfloat16)

    def output(self, model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        inputs = {
            "hidden_states": torch.randn(1, 12, 64, generator=generator).bfloat16(),
            "encoder_hidden_states": torch.randn(1, 5, 96, generator=generator).bfloat16(),
            "timestep": torch.tensor([0.7]),
        }
        with torch.no_grad():
            inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
            sample: Tensor = model(**inputs, img_shapes=[[(1, 3, 4)]]).sample
        return sample

    @pytest.mark.parametrize("pinned", [True, False])
    @pytest.mark.parametrize("resident", [1, 2, 5])
    def test_equals_the_resident_one(self, model: Any, pinned: bool, resident: int) -> None:
        expected = self.output(copy.deepcopy(model).cuda())
        model.set_offload(True, use_pin_memory=pinned, num_blocks_on_gpu=resident)
        manager = model.offload_manager
        assert manager.device == torch.device("cuda")
        assert all(p.is_cuda for block in manager.buffer_blocks for p in block.parameters())
        for index, block in enumerate(model.transformer_blocks):
            offloaded = index >= resident
            assert all(p.is_cuda is not offloaded for p in block.parameters())
            assert all(p.is_pinned() is (pinned and offloaded) for p in block.parameters())
        for _ in range(20):
            assert torch.equal(self.output(model), expected)

    def test_the_first_forward_makes_another_stream(self, model: Any) -> None:
        model.set_offload(True)
        manager = model.offload_manager
        stream = manager.memory_stream
        pinned = model.transformer_blocks[1].attn.to_qkv.proj_down.data_ptr()
        self.output(model)
        assert manager.device == torch.device("cuda", 0)
        first = manager.memory_stream
        assert first is not stream
        self.output(model)
        assert manager.memory_stream is first
        assert model.transformer_blocks[1].attn.to_qkv.proj_down.data_ptr() == pinned

    def test_changes_between_forwards(self, model: Any) -> None:
        model.set_offload(True)
        self.output(model)
        manager = model.offload_manager
        manager.memory_stream.synchronize()
        for index, block in enumerate((*model.transformer_blocks, *manager.buffer_blocks)):
            widen(block, 16, seed=index)
        found = [self.output(model) for _ in range(5)]
        model.set_offload(False)
        expected = self.output(model.cuda())
        assert all(torch.equal(output, expected) for output in found)

    def test_turned_off_leaves_blocks_where_they_are(self, model: Any) -> None:
        model.set_offload(True)
        self.output(model)
        model.set_offload(False)
        devices = [block.attn.to_qkv.qweight.device.type for block in model.transformer_blocks]
        assert devices == ["cuda", "cpu", "cpu", "cpu", "cpu"]
        assert model.img_in.weight.is_cuda

    def test_no_deep_copy_while_there_is_a_stream(self, model: Any) -> None:
        model.set_offload(True)
        with pytest.raises(TypeError, match="cannot pickle"):
            copy.deepcopy(model)

    def test_in_inference_mode(self, model: Any) -> None:
        expected = self.output(copy.deepcopy(model).cuda())
        with torch.inference_mode():
            model.set_offload(True)
            assert torch.equal(self.output(model), expected)
            assert torch.equal(self.output(model), expected)
