"""pyllmc/rng.py against vectors of the algorithms, which torch and llm.c print too."""

import hashlib
import struct

import numpy as np
import pytest

from pyllmc.config import GPT2Config
from pyllmc.model import initial_parameters
from pyllmc.rng import TorchGenerator, Xorshift64Star, random_permutation, shuffle
from pyllmc.tensors import views


def test_mt19937_words():
    assert TorchGenerator(42).uint32(5).tolist() == [1608637542, 3421126067, 4083286876, 787846414, 3143890026]
    assert TorchGenerator(137).uint32(5).tolist() == [4053805790, 2173880614, 380293709, 1237255315, 2986595568]


def test_words_do_not_depend_on_how_they_are_asked_for():
    generator = TorchGenerator(7)
    pieces = [generator.uint32(n) for n in (1, 2, 620, 3, 1, 0, 700)]
    assert np.array_equal(np.concatenate(pieces), TorchGenerator(7).uint32(1327))


def test_normals_of_torch():
    expected = [1.926915, 1.487284, 0.900717, -2.105521, 0.678418, -1.234545, -0.043067, -1.604667]
    expected += [-0.752136, 1.648723, -0.392479, -1.403607, -0.727881, -0.559430, -0.768839, 0.762446]
    assert TorchGenerator(42).normal(16) == pytest.approx(expected, abs=2e-6)


# torch.empty(n).normal_(generator=torch.Generator().manual_seed(42)) for each n in turn, from one generator
TORCH_NORMALS = {
    3: [0.33669036626815796, 0.12880940735340118, 0.23446236550807953],
    2: [0.23033303022384644, -1.1228563785552979],
    17: [-0.24825750291347504, 0.09154565632343292, -2.316922664642334],
}


def test_normals_of_small_and_odd_sizes():
    generator = TorchGenerator(42)
    for n, start in TORCH_NORMALS.items():
        assert generator.normal(n)[: len(start)] == pytest.approx(start, abs=2e-6)


def test_normals_are_normal_and_scale():
    values = TorchGenerator(1).normal(200_003)
    assert values.dtype == np.float32 and abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert np.isfinite(values).all() and np.abs(values).max() < 6
    assert TorchGenerator(1).normal(200_003, std=0.02) == pytest.approx(0.02 * values, rel=1e-6)


def test_normals_are_those_of_numpys_functions():
    uniforms = (TorchGenerator(5).uint32(1600) & 0xFFFFFF).reshape(-1, 2, 8) / 2.0**24
    radius, angle = np.sqrt(-2 * np.log1p(-uniforms[:, 0])), 2 * np.pi * uniforms[:, 1]
    expected = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)
    assert TorchGenerator(5).normal(1600) == pytest.approx(expected, abs=1e-7, rel=1e-7)


def test_permutations():
    assert random_permutation(10, TorchGenerator(42)).tolist() == [1, 3, 9, 7, 6, 0, 8, 4, 5, 2]
    samples = random_permutation(1192, TorchGenerator(42))
    assert samples[:8].tolist() == [408, 791, 914, 1057, 81, 450, 299, 907]
    assert sorted(samples.tolist()) == list(range(1192)) and samples.dtype == np.int32
    generator = TorchGenerator(42)
    assert random_permutation(1, generator).tolist() == [0] and random_permutation(0, generator).tolist() == []
    assert generator.uint32(1)[0] == 1608637542


def test_shuffle_goes_on_from_the_order_it_finds():
    order = np.array([2, 0, 1], np.int32)
    generator = TorchGenerator(3)
    words = TorchGenerator(3).uint32(2).tolist()
    expected = [2, 0, 1]
    for i, word in zip((2, 1), words, strict=True):
        j = word % (i + 1)
        expected[i], expected[j] = expected[j], expected[i]
    shuffle(order, generator)
    assert order.tolist() == expected


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625, 1000])
def test_generator_state_round_trip(drawn):
    generator = TorchGenerator(42)
    generator.uint32(drawn)
    data = generator.to_bytes()
    assert len(data) == 2520
    left, position = struct.unpack_from("<iI", data, 8)
    assert left + position == 625 and struct.unpack_from("<2I", data, 2512) == (0, 0x9908B0DF)
    assert np.array_equal(TorchGenerator.from_bytes(data).uint32(1300), generator.uint32(1300))


def test_generator_state_of_a_freshly_seeded_llmc():
    # There left = 1 and next = 0 until the first word is drawn.
    data = bytearray(TorchGenerator(42).to_bytes())
    struct.pack_into("<iI", data, 8, 1, 0)
    assert TorchGenerator.from_bytes(bytes(data)).uint32(1)[0] == 1608637542


def test_damaged_generator_states():
    data = TorchGenerator(42).to_bytes()
    with pytest.raises(ValueError, match="a generator state has 2520 bytes, got 2519"):
        TorchGenerator.from_bytes(data[:-1])
    for left, position in ((0, 0), (-5, 630), (625, 700), (3, 3), (-(2**31), 2**32 - 1)):
        with pytest.raises(ValueError, match="do not fit together"):
            TorchGenerator.from_bytes(data[:8] + struct.pack("<iI", left, position) + data[16:])


def test_xorshift():
    coins = Xorshift64Star()
    assert [coins.uint32() for _ in range(5)] == [989205090, 818269915, 1335155955, 3876892996, 2941700015]
    coins = Xorshift64Star(13371337)
    assert [coins.uint32() for _ in range(3)] == [740755583, 337499614, 90980514]
    coins = Xorshift64Star()
    expected = [0.230317235, 0.190518260, 0.310865164, 0.902659476, 0.684917867]
    assert [coins.random() for _ in range(5)] == pytest.approx(expected, abs=1e-9)
    again = Xorshift64Star(coins.state)
    assert again.uint32() == coins.uint32()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match="seed must be from 0 to 4294967295"):
        TorchGenerator(seed)


@pytest.mark.parametrize("state", [-1, 0, 2**64])
def test_xorshift_states_out_of_range(state):
    with pytest.raises(ValueError, match="must be from 1"):
        Xorshift64Star(state)


def test_initial_parameters():
    config = GPT2Config(num_layers=2, num_heads=2, channels=64, vocab_size=100, max_seq_len=16)
    flat = initial_parameters(config, seed=42)
    params = views(flat, config)
    generator = TorchGenerator(42)
    assert np.array_equal(params["wte"][:100].reshape(-1), generator.normal(6400, 0.02))
    assert np.array_equal(params["wpe"].reshape(-1), generator.normal(1024, 0.02))
    for layer in range(2):
        for name, std in (("qkvw", 0.02), ("attprojw", 0.01), ("fcw", 0.02), ("fcprojw", 0.01)):
            weight = params[name][layer].reshape(-1)
            assert np.array_equal(weight, generator.normal(weight.size, std))
    assert not params["wte"][100:].any()
    for name, view in params.items():
        if name.endswith("b"):
            assert not view.any()
        if name.startswith("ln") and name.endswith("w"):
            assert (view == 1).all()


def test_the_bits_are_the_same_on_every_machine():
    values = TorchGenerator(42).normal(1_000_003, 0.02).astype("<f4")
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    assert digest == "9660b338e5653ce6d1f86947b0953accf59b388ed1f96b3f27fff361eedcbf1c"
