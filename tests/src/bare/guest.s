# A guest without an operating system that works memory in every way a processor can write it, and checks what it wrote in the pass
# before. It runs under KVM wherever that answers, however slowly.
#
# It is assembled by whoever uses it (mod.rs): every Rust has an assembler and a linker with it.
#
# Each vCPU has a line of 64 bytes from 0x6000 on:
#   +0   0x6261726521 once it works        +32  what should have been there
#   +8   passes it has made                +40  what was there
#   +16  errors it has seen                +48  the last time by its kvmclock, in ns; 0 without one
#   +24  where the first one was           +56  blocks it has read from the disk by DMA
# 0x6200 counts the starts. At 0x6240 is what it knows of its screen:
#   +0   where the frame buffer is; 0 without one      +16  lines
#   +8   bytes from a line to the next                  +20  bytes from a pixel to the next
#   +12  pixels in a line                               +24  lines drawn, from first to last again and again
.intel_syntax noprefix
.global _start

.set WORDS,   0x6000
.set STARTS,  0x6200
.set SCREEN,  0x6240
.set MODES,   0x4000                    # what the firmware says of its screens
.set MODE,    0x4200
.set PML4,    0x10000
.set PDPT,    0x11000
.set PDS,     0x12000                   # four of them: 4 GiB
.set TABLES,  0x20000                   # one page table a vCPU
.set RING,    0x30000
.set REQUEST, 0x3e000
.set CLOCK,   0x3d000
.set PAGES,   0x1000000                 # 16 MiB: 2 MiB a vCPU, by small pages
.set HUGE,    0x2000000                 # 32 MiB: 2 MiB a vCPU, by one huge page each
.set BUFFERS, 0x1800000                 # 24 MiB: where the disk's blocks land
.set COUNT,   128                       # small pages that a vCPU writes in a pass
.set BLOCKS,  64                        # blocks of 4 KiB on the disk, from 1 MiB on
.set CPUS,    4

.code16
_start:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
    mov si, offset packet
    mov ah, 0x42
    int 0x13
    jc .
    jmp loaded
packet:
    .byte 16, 0
    .word 15                            # sectors
    .word 0x7e00, 0                     # to
    .quad 1                             # from
.org 0x1fe
    .word 0xaa55

loaded:
    call find_screen
    # The firmware's disk and timer say nothing any more.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    # Words, tables and rings are zeros.
    xor eax, eax
    mov edi, WORDS
    mov ecx, 0x200 / 4
    cld
    rep stosd
    push 0x1000
    pop es
    xor di, di
    mov ecx, 0x10000 / 4
    rep stosd
    push 0x2000
    pop es
    xor di, di
    mov ecx, 0x10000 / 4
    rep stosd
    push 0x3000
    pop es
    xor di, di
    mov ecx, 0x10000 / 4
    rep stosd
    xor ax, ax
    mov es, ax
    inc dword ptr [STARTS]
    mov dword ptr [next_cpu], 0
    # 4 GiB as they are, by huge pages.
    push 0x1000
    pop ds
    mov dword ptr [0], PDPT | 7
    mov edi, PDPT - PML4
    mov eax, PDS | 7
    mov cx, 4
1:  mov [edi], eax
    add eax, 0x1000
    add edi, 8
    loop 1b
    mov edi, PDS - PML4
    mov eax, 0x87
    mov cx, 2048
1:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    loop 1b
    # … but for what is written by small ones.
    mov edi, PDS - PML4 + (PAGES >> 21) * 8
    mov eax, TABLES | 7
    mov cx, CPUS
1:  mov [edi], eax
    add eax, 0x1000
    add edi, 8
    loop 1b
    push 0x2000
    pop ds
    xor edi, edi
    mov eax, PAGES | 7
    mov cx, CPUS * 512
1:  mov [edi], eax
    add eax, 0x1000
    add edi, 8
    loop 1b
    xor ax, ax
    mov ds, ax
    jmp enter

# Where the other vCPUs begin.
.org 0x400
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
enter:
    lgdt [gdtr]
    mov eax, cr4
    or eax, 0x20                        # PAE
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    and eax, 0x9fffffff                 # caches on
    mov cr0, eax
    .byte 0x66, 0xea
    .long long_mode
    .word 8

.balign 8
gdt:
    .quad 0
    .quad 0x00af9a000000ffff
    .quad 0x00cf92000000ffff
gdtr:
    .word 23
    .long gdt
next_cpu:
    .long 0

.code64
long_mode:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov ebp, 1
    lock xadd [next_cpu], ebp
    cmp ebp, CPUS
    jae idle
    # rbx its words, r12 its small pages, r14 its huge page, r15 its page table
    mov ebx, ebp
    shl ebx, 6
    add ebx, WORDS
    mov r12d, ebp
    shl r12d, 21
    lea r14, [r12 + HUGE]
    add r12, PAGES
    mov r15d, ebp
    shl r15d, 12
    add r15d, TABLES
    mov esp, ebp
    shl esp, 8
    add esp, 0x7200 - 0x800
    # The first pass is written without a look at what is there.
    xor r13d, r13d
    mov rdi, r12
    mov ecx, COUNT * 512
    xor eax, eax
    rep stosq
    xor ecx, ecx
1:  mov rdx, rcx
    shl rdx, 12
    add rdx, r12
    mov [rdx + rcx * 8], rcx
    mov [rdx + 4088], rcx
    inc ecx
    cmp ecx, COUNT
    jb 1b
    xor ecx, ecx
1:  mov rdx, rcx
    shl rdx, 17
    mov [r14 + rdx], rcx
    inc ecx
    cmp ecx, 16
    jb 1b
    test ebp, ebp
    jnz work
    call find_disk
    call find_clock
    # INIT and start the others, at 0x8000.
    mov eax, 0xfee00300
    mov dword ptr [rax], 0xc4500
    mov ecx, 100000
1:  pause
    loop 1b
    mov dword ptr [rax], 0xc4608
work:
    mov rax, 0x6261726521
    mov [rbx], rax
pass:
    # The small pages.
    xor ecx, ecx
page:
    mov rsi, rcx
    shl rsi, 12
    add rsi, r12                        # the page
    lea rdi, [rsi + rcx * 8]            # a word in it
    mov r8, r13
    shl r8, 8
    or r8, rcx                          # what the pass before has left
    lea r9, [r8 + 256]                  # what this one leaves
    mov r10, [rdi]
    call compare
    lea rdi, [rsi + 4088]
    mov r10, [rdi]
    call compare
    lea rdi, [rsi + rcx * 8]
    # Each eighth page: the processor must have noted down its last write, and does so again.
    test cl, 7
    jnz 1f
    lea rdx, [r15 + rcx * 8]
    call noted
    lock and dword ptr [rdx], 0xffffff9f
    invlpg [rsi]
1:  mov eax, ecx
    and eax, 3
    jz plain
    cmp eax, 1
    je atomic
    cmp eax, 2
    je string
    # Exchanged.
    mov rax, r9
    xchg [rdi], rax
    mov r10, rax
    call compare
    mov [rsi + 4088], r9
    jmp written
plain:
    mov [rdi], r9
    mov [rsi + 4088], r9
    jmp written
atomic:
    mov rax, r8
    lock cmpxchg [rdi], r9
    mov r10, rax
    call compare
    mov eax, 256
    lock xadd [rsi + 4088], rax
    jmp written
string:
    push rcx
    push rdi
    mov rdi, rsi
    mov ecx, 512
    mov rax, r9
    rep stosq
    pop rdi
    pop rcx
written:
    test cl, 7
    jnz 1f
    call noted
1:  inc ecx
    cmp ecx, COUNT
    jb page
    # The huge page.
    xor ecx, ecx
huge:
    mov rdi, rcx
    shl rdi, 17
    add rdi, r14
    mov r8, r13
    shl r8, 8
    or r8, rcx
    mov r10, [rdi]
    call compare
    lea r9, [r8 + 256]
    mov [rdi], r9
    inc ecx
    cmp ecx, 16
    jb huge
    test ebp, ebp
    jnz 1f
    call read_disk
    call read_clock
    call draw
1:  inc r13
    mov [rbx + 8], r13
    jmp pass

idle:
    hlt
    jmp idle

# r10 was found at rdi, where r8 should be.
compare:
    cmp r10, r8
    jne wrong
    ret
wrong:
    cmp qword ptr [rbx + 16], 0
    jne 1f
    mov [rbx + 24], rdi
    mov [rbx + 32], r8
    mov [rbx + 40], r10
1:  inc qword ptr [rbx + 16]
    ret

# The page table's entry at rdx says: accessed and dirty.
noted:
    mov r10, [rdx]
    and r10d, 0x60
    cmp r10d, 0x60
    je 1f
    push rdi
    push r8
    mov rdi, rdx
    mov r8d, 0x60
    call wrong
    pop r8
    pop rdi
1:  ret

# The first virtio disk of bus 0, as virtio 0.9 has it: its ports are in [port].
find_disk:
    mov ecx, 0x80000000
1:  mov eax, ecx
    call read_pci
    cmp eax, 0x10011af4
    je 2f
    add ecx, 0x800
    cmp ecx, 0x80010000
    jb 1b
    ret
2:  lea eax, [ecx + 4]
    call read_pci
    or eax, 5                           # ports, bus master
    out dx, eax
    lea eax, [ecx + 0x10]
    call read_pci
    and eax, 0xfffc
    mov [port], eax
    lea edx, [eax + 0x12]               # its state
    xor eax, eax
    out dx, al
    mov al, 3
    out dx, al
    mov edx, [port]
    add edx, 4                          # features: none
    xor eax, eax
    out dx, eax
    add edx, 10                         # the first queue
    out dx, ax
    sub edx, 2
    in ax, dx
    movzx eax, ax
    mov [size], eax
    shl eax, 4
    add eax, RING
    mov [avail], eax
    mov ecx, [size]
    lea eax, [eax + ecx * 2 + 6 + 4095]
    and eax, 0xfffff000
    mov [used], eax
    sub edx, 4
    mov eax, RING >> 12
    out dx, eax
    add edx, 10
    mov al, 7
    out dx, al
    ret

read_pci:
    mov dx, 0xcf8
    out dx, eax
    mov dx, 0xcfc
    in eax, dx
    ret

# Reads the block of this pass from the disk, and looks at it.
read_disk:
    cmp dword ptr [port], 0
    je 9f
    mov rcx, r13
    and ecx, BLOCKS - 1
    mov dword ptr [REQUEST], 0          # a read
    mov dword ptr [REQUEST + 4], 0
    lea eax, [ecx * 8 + 2048]
    mov [REQUEST + 8], rax
    mov byte ptr [REQUEST + 16], 0xff
    mov rdi, rcx
    shl rdi, 12
    add rdi, BUFFERS
    mov qword ptr [rdi], 0
    mov qword ptr [rdi + 4088], 0
    mov eax, RING
    mov qword ptr [rax], REQUEST
    mov dword ptr [rax + 8], 16
    mov dword ptr [rax + 12], 0x10001   # goes on with 1
    mov [rax + 16], rdi
    mov dword ptr [rax + 24], 4096
    mov dword ptr [rax + 28], 0x20003   # is written, goes on with 2
    mov qword ptr [rax + 32], REQUEST + 16
    mov dword ptr [rax + 40], 1
    mov dword ptr [rax + 44], 2         # is written
    mov esi, [avail]
    movzx edx, word ptr [rsi + 2]
    mov eax, [size]
    dec eax
    and eax, edx
    mov word ptr [rsi + rax * 2 + 4], 0
    mfence
    inc edx
    mov [rsi + 2], dx
    mfence
    mov esi, [used]
    push rdx
    mov edx, [port]
    add edx, 16                         # notify
    xor eax, eax
    out dx, ax
    pop rdx
1:  pause
    cmp [rsi + 2], dx
    jne 1b
    mov r8, 0xb10c000000000000
    or r8, rcx
    mov r10, [rdi]
    call compare
    add rdi, 4088
    mov r10, [rdi]
    call compare
    inc qword ptr [rbx + 56]
9:  ret

# KVM's clock, if there is one.
find_clock:
    push rbx
    mov eax, 0x40000000
    cpuid
    cmp ebx, 0x4b4d564b
    jne 1f
    mov eax, 0x40000001
    cpuid
    test al, 8
    jz 1f
    mov ecx, 0x4b564d01
    mov eax, CLOCK | 1
    xor edx, edx
    wrmsr
    mov dword ptr [has_clock], 1
1:  pop rbx
    ret

# It never goes back.
read_clock:
    cmp dword ptr [has_clock], 0
    je 9f
    mov esi, CLOCK
1:  mov r9d, [rsi]
    test r9d, 1
    jnz 1b
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [rsi + 8]
    mov cl, [rsi + 28]
    test cl, cl
    js 2f
    shl rax, cl
    jmp 3f
2:  neg cl
    shr rax, cl
3:  mov edx, [rsi + 24]
    mul rdx
    shrd rax, rdx, 32
    add rax, [rsi + 16]
    cmp r9d, [rsi]
    jne 1b
    mov r10, rax
    mov r8, [rbx + 48]
    cmp r10, r8
    jae 4f
    lea rdi, [rbx + 48]
    call wrong
4:  mov [rbx + 48], r10
9:  ret

# The next line of the picture: each pixel is the one before it and a number more.
draw:
    mov edi, [SCREEN]
    test edi, edi
    jz 9f
    mov rax, [SCREEN + 24]
    xor edx, edx
    mov ecx, [SCREEN + 16]
    div rcx
    imul edx, [SCREEN + 8]
    add rdi, rdx
    imul eax, [SCREEN + 24], 0x9e3779b1
    mov ecx, [SCREEN + 12]
    mov esi, [SCREEN + 20]
1:  mov [rdi], ax
    mov edx, eax
    shr edx, 16
    mov [rdi + 2], dl
    add rdi, rsi
    add eax, 0x01000193
    dec ecx
    jnz 1b
    inc qword ptr [SCREEN + 24]
9:  ret

# Sets the first mode (VBE) that has a frame buffer, a byte for each colour and enough pixels.
.code16
find_screen:
    cld
    xor eax, eax
    mov di, SCREEN
    mov cx, 8
    rep stosd
    mov di, MODES
    mov dword ptr [di], 0x32454256      # VBE2
    mov ax, 0x4f00
    int 0x10
    cmp ax, 0x4f
    jne 9f
    mov si, [MODES + 14]
1:  mov es, [MODES + 16]
    mov cx, es:[si]
    push 0
    pop es
    cmp cx, 0xffff
    je 9f
    add si, 2
    pusha
    mov di, MODE
    mov ax, 0x4f01
    int 0x10
    cmp ax, 0x4f
    popa
    jne 1b
    mov ax, [MODE]                      # it is there, has pixels, and they are in memory
    and ax, 0x91
    cmp ax, 0x91
    jne 1b
    cmp word ptr [MODE + 18], 640
    jb 1b
    mov al, [MODE + 25]                 # bits of a pixel
    cmp al, 24
    je 2f
    cmp al, 32
    jne 1b
2:  mov bx, cx
    or bx, 0x4000
    mov ax, 0x4f02
    int 0x10
    cmp ax, 0x4f
    jne 9f
    mov eax, [MODE + 40]
    mov [SCREEN], eax
    mov ax, [MODE + 16]
    mov [SCREEN + 8], ax
    mov ax, [MODE + 18]
    mov [SCREEN + 12], ax
    mov ax, [MODE + 20]
    mov [SCREEN + 16], ax
    movzx ax, byte ptr [MODE + 25]
    shr ax, 3
    mov [SCREEN + 20], ax
9:  ret
.code64

.balign 4
port:      .long 0
size:      .long 0
avail:     .long 0
used:      .long 0
has_clock: .long 0
end_of_code:
.org 0x2000
