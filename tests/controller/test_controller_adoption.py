"""A new controller learns what runs from the workers, each of which brings its part."""

from controller_scene import World, kinds

from spotserve.core.messages import Activate, Deactivate, Publish


def test_what_serves_goes_on_serving() -> None:
    world = World()
    world.serve("i-1", "i-2")
    before = world.serving()
    world.restart()
    assert kinds(world.register("i-1")) == ["Publish"]
    assert kinds(world.register("i-2")) == ["Publish"]
    assert world.serving() == before
    (activate,) = [command for command in world.join("i-3") if isinstance(command, Activate)]
    assert activate.replica.replica_id not in before, "an identity is never used twice"


def test_a_replica_serves_again_when_every_part_has_been_heard_of() -> None:
    world = World(None, 2, 2)
    world.serve("i-1", "i-2", devices=2)
    before = world.serving()
    world.restart()
    assert not any(isinstance(command, Activate | Deactivate) for command in world.register("i-1"))
    assert world.serving() == []
    (publish,) = world.register("i-2")
    assert isinstance(publish, Publish)
    assert world.serving() == before


def test_a_replica_whose_parts_do_not_come_is_dropped_and_replaced() -> None:
    world = World(None, 2, 1)
    world.serve("i-1", "i-2")
    world.restart()
    world.machines["i-2"].is_gone = True
    world.register("i-1")
    commands = world.wait(4.0)
    assert [type(command) for command in commands if not isinstance(command, Publish)] == [Deactivate, Activate]
    world.answer_all()
    assert world.shapes() == [(1, 1)]


def test_the_newer_of_two_replicas_on_a_device_goes_on() -> None:
    world = World(1, 1, 1)
    world.serve("i-1", "i-2")
    (old,) = world.serving()
    world.reshape(1, 2, 1)
    while coming := world.coming():
        world.become_ready(*coming[0])
    (new,) = world.serving()
    world.settings = world.settings.model_copy(update={"pipeline": 2})
    world.restart()
    world.register("i-1")
    world.register("i-2")
    assert world.serving() == [new]
    assert old in world.draining, "its sequences go to the newer one"
    world.answer_all()
    assert world.state.replicas.keys() == {new}


def test_a_part_of_a_replica_that_has_ended_is_taken_down() -> None:
    world = World(1, 2, 1)
    world.serve("i-1", "i-2")
    lost = world.machines["i-2"]
    world.lose("i-2")
    lost.is_gone = False  # only its connection had broken
    deactivates = [command for command in world.register("i-2") if isinstance(command, Deactivate)]
    assert {command.slot.replica_id for command in deactivates if command.instance_id == "i-2"} == {"r-2"}
    world.answer_all()
    assert world.shapes() == [(2, 1)]
