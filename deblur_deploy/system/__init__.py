"""What the operating system tells and demands: processor, memory, containers, forks, folders; standard library only."""
