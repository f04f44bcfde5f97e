// Runs a program on the overlay, with a memory at its ports, and compares all of memory after it.
// Prints PASS with the cycles that it took, or FAIL with what differs. Sizes are in testbench.vh.

`timescale 1ns / 1ps
`include "testbench.vh"

module testbench;
  localparam UNDER_WAY = 256;

  reg clk = 0;
  reg i_valid = 0, r_ready = 0, d_valid = 0, w_ready = 0;
  reg [63:0] i_data = 0, d_data = 0;
  wire i_ready, r_valid, w_valid, busy;
  wire [31:0] r_address, w_address, cycles;
  wire [63:0] w_data;

  overlay core (
      .clk(clk),
      .i_valid(i_valid), .i_ready(i_ready), .i_data(i_data),
      .r_valid(r_valid), .r_ready(r_ready), .r_address(r_address),
      .d_valid(d_valid), .d_data(d_data),
      .w_valid(w_valid), .w_ready(w_ready), .w_address(w_address), .w_data(w_data),
      .busy(busy), .cycles(cycles)
  );

  reg [63:0] instructions [0:`INSTRUCTION_BEATS - 1];
  reg [63:0] memory [0:`MEMORY_BEATS - 1];
  reg [63:0] expected [0:`MEMORY_BEATS - 1];
  // What was read and has not arrived: its data, and the cycle in which it does.
  reg [63:0] data [0:UNDER_WAY - 1];
  integer due [0:UNDER_WAY - 1];

  // Of the core's counter, before it runs.
  reg [31:0] counted = 0;
  integer now = 0, next = 0, reads = 0, arrived = 0, moved = 0, wrong = 0, place;
  reg write_next = 0, gives, reading, writing;

  initial begin
    $readmemh("instructions.hex", instructions);
    $readmemh("memory.hex", memory);
    $readmemh("expected.hex", expected);
  end

  always #5 clk = !clk;

  // The core takes its inputs at the rising edge, and all its outputs are registers.
  always @(negedge clk) begin
    now = now + 1;
    gives = 0;
    if (now == 6) counted = cycles;
    if (now > 6) begin
      gives = next < `INSTRUCTION_BEATS && i_ready;
      i_valid = next < `INSTRUCTION_BEATS;
      if (i_valid) i_data = instructions[next];
      if (gives) next = next + 1;
      // One beat in a cycle; who was not served is first.
      reading = r_valid && !(w_valid && write_next);
      writing = w_valid && !reading;
      if (r_valid && w_valid) write_next = reading;
      r_ready = reading;
      w_ready = writing;
      if (reading) begin
        check(r_address);
        data[reads % UNDER_WAY] = memory[r_address / 8];
        due[reads % UNDER_WAY] = now + `MEMORY_LATENCY;
        reads = reads + 1;
      end
      if (writing) begin
        check(w_address);
        memory[w_address / 8] = w_data;
      end
      d_valid = arrived < reads && due[arrived % UNDER_WAY] <= now;
      if (d_valid) begin
        d_data = data[arrived % UNDER_WAY];
        arrived = arrived + 1;
      end
      if (gives || reading || writing || d_valid) moved = now;
      // `busy` tells of a beat two cycles after it was taken.
      if (next == `INSTRUCTION_BEATS && !busy && now > moved + 3) finish;
      if (now > moved + `PATIENCE) begin
        $display("FAIL: nothing moved for %0d cycles", `PATIENCE);
        $fatal;
      end
    end
  end

  task check(input [31:0] address);
    if (address % 8 != 0 || address / 8 >= `MEMORY_BEATS) begin
      $display("FAIL: byte %0d is outside of memory", address);
      $fatal;
    end
  endtask

  task finish;
    begin
      for (place = 0; place < `MEMORY_BEATS; place = place + 1)
        if (memory[place] !== expected[place]) begin
          if (wrong < 10)
            $display("byte %0d: %h instead of %h", 8 * place, memory[place], expected[place]);
          wrong = wrong + 1;
        end
      if (wrong != 0) begin
        $display("FAIL: %0d of %0d beats differ", wrong, `MEMORY_BEATS);
        $fatal;
      end
      $display("PASS: %0d beats are as expected, after %0d cycles", `MEMORY_BEATS, cycles - counted);
      $finish;
    end
  endtask
endmodule
