import pytest
import timm
import torch
from conftest import TEACHER
from huggingface_hub import constants
from torch import nn

from hep2.teacher import Teacher, Teachers


def test_a_teacher_has_the_weights_of_its_file_but_for_the_head(teacher_file):
    saved = torch.load(teacher_file, weights_only=True)
    network = Teacher(TEACHER, teacher_file).network.state_dict()
    own = {name for name, tensor in network.items() if tensor.shape != saved[name].shape}
    assert own == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(network[name], saved[name]) for name in network.keys() - own)


def test_a_teacher_takes_cells_and_gives_logits_of_six_classes(teacher_file):
    teacher = Teacher(TEACHER, teacher_file, size=64).eval()
    images = torch.rand(3, 1, 78, 78)
    with torch.no_grad():
        logits = teacher(images)
        assert logits.shape == (3, 6)
        # It sees what its network was pretrained on: three channels, centred, of the size that was asked for.
        grey = torch.full((1, 1, 78, 78), 0.5)
        config = teacher.network.pretrained_cfg
        mean, spread = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        expected = teacher.network(((0.5 - mean) / spread).expand(1, 3, 64, 64))
        torch.testing.assert_close(teacher(grey), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_to_be_restored_asks_for_no_weights():
    restored = Teacher(TEACHER, pretrained=False)
    restored.load_state_dict(Teacher(TEACHER, pretrained=False).state_dict())


def test_several_teachers_answer_with_the_mean_of_their_probabilities():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 6)) for _ in range(2)]
    teacher, images = Teachers(networks), torch.rand(5, 1, 2, 2)
    answers = teacher(images)
    assert not answers.requires_grad
    torch.testing.assert_close(answers, sum(network(images).softmax(1) for network in networks) / 2)
    torch.testing.assert_close(answers.sum(1), torch.ones(5))


def test_a_name_that_timm_does_not_know_is_told():
    with pytest.raises(ValueError, match=r"'no_such_network'.*Unknown model.*--teacher none"):
        Teacher("no_such_network")


def test_a_network_that_the_hub_cannot_give_is_told(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # or it tries again for most of a minute
    with pytest.raises(ValueError, match=r"'test_vit' on the Hugging Face Hub.*NAME=FILE.*--teacher none"):
        Teacher("test_vit")


@pytest.mark.parametrize("kind", ["missing", "damaged", "of another network"])
def test_a_file_that_does_not_fit_is_told(kind, tmp_path):
    file = tmp_path / "weights.pt"
    if kind == "damaged":
        file.write_bytes(b"no weights")
    elif kind == "of another network":
        torch.save(timm.create_model("test_vit").state_dict(), file)
    with pytest.raises(ValueError, match=rf"no pretrained weights of '{TEACHER}' in {file} \(.+\)"):
        Teacher(TEACHER, file)
