# The smallest guest: a boot sector that does what it is told by the keyboard and leaves its answers at 0x6000.
# Between two keys it halts with all interrupts masked but the keyboard's, so that two guests that were told the
# same have the same memory.
#
#   as --32 guest.s -o guest.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary guest.o -o guest.bin
#
#   0x6000  0x7768 once it runs
#   0x6002  how many keys it has handled since
#   0x6004  the last one's scan code
#   0x6006  the sum of its memory, when it was asked for last
#   0x6008  seconds of the real-time clock, when they were asked for last (BCD)
#   0x600a  how many pages it has filled
#   0x600c  how often it has started
.code16
.global _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7000, %sp
    ljmp $0, $here
here:
    # The keyboard's IRQ 1 is vector 9.
    movw $key, 0x24
    movw $0, 0x26
    movw $0, 0x6002
    movw $0, 0x6004
    movw $0, 0x6006
    movw $0, 0x6008
    movw $0, 0x600a
    # What was typed at the firmware.
1:  inb $0x64, %al
    testb $1, %al
    jz 2f
    inb $0x60, %al
    jmp 1b
2:  movb $0xfd, %al
    outb %al, $0x21
    movb $0xff, %al
    outb %al, $0xa1
    movw $0x7768, 0x6000
    incw 0x600c
rest:
    sti
    hlt
    jmp rest

key:
    inb $0x60, %al
    testb $0x80, %al
    jnz released
    xorb %ah, %ah
    movw %ax, 0x6004
    cmpb $0x18, %al             # o
    je off
    cmpb $0x1f, %al             # s
    je sleep
    cmpb $0x13, %al             # r
    je reset
    cmpb $0x19, %al             # p
    je panic
    cmpb $0x2f, %al             # v
    je verify
    cmpb $0x14, %al             # t
    je time
    # Any other fills the next of 127 pages from 64 KiB on.
    movb %al, %bl
    movw 0x600a, %ax
    incw 0x600a
    xorb %ah, %ah
    shlw $8, %ax
    addw $0x1000, %ax
    cmpw $0x8f00, %ax
    jb 1f
    movw $0, 0x600a
    movw $0x8f00, %ax
1:  movw %ax, %es
    xorw %di, %di
    movb %bl, %al
    movb 0x600a, %ah
    movw $2048, %cx
    cld
    rep stosw
    jmp done
verify:
    # Of 512 KiB from 64 KiB on.
    xorw %bx, %bx
    movw $0x1000, %ax
1:  movw %ax, %es
    xorw %si, %si
    movw $0x4000, %cx
2:  addw %es:(%si), %bx
    adcw $0, %bx
    incw %si
    incw %si
    loop 2b
    addw $0x0800, %ax
    cmpw $0x9000, %ax
    jb 1b
    movw %bx, 0x6006
    jmp done
time:
    movb $0, %al
    outb %al, $0x70
    inb $0x71, %al
    xorb %ah, %ah
    movw %ax, 0x6008
    jmp done
off:
    movw $0x2000, %ax
    jmp pm
sleep:
    movw $0x2400, %ax
pm: movw $0x604, %dx
    outw %ax, %dx
    jmp done
reset:
    movw $0xcf9, %dx
    movb $6, %al
    outb %al, %dx
    jmp done
panic:
    movw $0x505, %dx
    movb $1, %al
    outb %al, %dx
done:
    incw 0x6002
released:
    movb $0x20, %al
    outb %al, $0x20
    iret
.org 510
.word 0xaa55
