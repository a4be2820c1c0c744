"""What a run will need, before it starts: of the devices that are here, or of chips that are not.

Begin with `needs`, memory and arithmetic from the compiled step; `topology` has it compiled for a TPU pod by
the pod's own compiler, `program` reads what that makes of it, `roofline` says how fast it can be and `report`
tells both.
"""
