#!/usr/bin/env python3
"""Stops a Duckiebot whose driver fell silent. Runs ON the robot, where no network is in the way:

    python3 duckiebot_guard.py NAME

A daffy robot goes on with its last command for ever. When no command came for 0.5 s and the last
one moved the wheels, this sends ten zeros. It says that it is there on /NAME/redraw_guard.
docs/duckiebot.md says how to start it. It was never tried on a robot.
"""

import sys
import time

import rospy
from duckietown_msgs.msg import WheelsCmdStamped
from std_msgs.msg import Float32

TIMEOUT = 0.5  # s without a command


class Guard:
    def __init__(self, robot):
        topic = f"/{robot}/wheels_driver_node/wheels_cmd"
        self.zeros = 0  # that are still to be sent when commands cease
        self.heard = 0.0
        self.wheels = rospy.Publisher(topic, WheelsCmdStamped, queue_size=1)
        self.alive = rospy.Publisher(f"/{robot}/redraw_guard", Float32, queue_size=1)
        rospy.Subscriber(topic, WheelsCmdStamped, self.on_command)

    def on_command(self, message):
        if message._connection_header["callerid"] != rospy.get_name():  # not a zero from here
            self.heard = time.monotonic()
            self.zeros = 10 if message.vel_left or message.vel_right else 0

    def step(self):
        self.alive.publish(TIMEOUT)
        if self.zeros and time.monotonic() - self.heard > TIMEOUT:
            self.wheels.publish(WheelsCmdStamped())
            self.zeros -= 1


if __name__ == "__main__":
    rospy.init_node("redraw_guard")
    guard = Guard(sys.argv[1])
    while not rospy.is_shutdown():
        guard.step()
        time.sleep(0.05)
